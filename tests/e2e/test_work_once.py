"""How often a validated build of the example loads the model and parses its graph: neither may grow unnoticed."""

from __future__ import annotations

import traceback
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import onnx
import pytest
from click.testing import CliRunner
from torch import nn

from nemotrt.exporter.cli import program
from nemotrt.model.hybrid import NemotronH

ROOT = Path(__file__).resolve().parents[2]
MAX_LOADS, MAX_PARSES = 3, 3
"""The FP32 reference twice and its rounding baseline; the graph for the validation, the manifest and the report."""

Stacks = Counter[tuple[str, ...]]


def caller_stack() -> tuple[str, ...]:
    frames = [frame for frame in traceback.extract_stack() if "nemotrt" in frame.filename]
    return tuple(f"{frame.filename.partition('nemotrt/')[2]}:{frame.lineno} {frame.name}" for frame in frames)


def counted(stacks: Stacks, call: Callable[..., Any], matches: Callable[..., bool]) -> Callable[..., Any]:
    """The function, recording the stack of every call whose arguments match."""

    def recording(*args: Any, **kwargs: Any) -> Any:
        if matches(*args):
            stacks[caller_stack()] += 1
        return call(*args, **kwargs)

    return recording


def listing(stacks: Stacks) -> str:
    return "\n\n".join(f"{count} times\n  " + "\n  ".join(stack) for stack, count in stacks.items())


@pytest.mark.slow
def test_a_validated_build_loads_the_model_and_parses_the_graph_a_few_times(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    loads, parses = Stacks(), Stacks()
    monkeypatch.setattr(
        nn.Module,
        "load_state_dict",
        counted(loads, nn.Module.load_state_dict, lambda module, *_: isinstance(module, NemotronH)),
    )
    monkeypatch.setattr(
        onnx, "load", counted(parses, onnx.load, lambda path, *_: Path(path).name == "model.onnx")
    )
    options = ["--precision", "bf16", "--runtime", "onnx", "--output", str(tmp_path / "bundle")]
    result = CliRunner().invoke(program, ["build", str(ROOT / "examples" / "tiny"), *options])
    assert result.exit_code == 0, result.output
    assert 2 <= loads.total() <= MAX_LOADS, listing(loads)
    assert 1 <= parses.total() <= MAX_PARSES, listing(parses)
