"""What `check` says that a build needs, against a build: what does not depend on the machine."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from checkpoints import CONFIG, write_checkpoint

from nemotrt.exporter.checkpoint.safetensors_reader import SINGLE
from nemotrt.exporter.config import BuildConfig
from nemotrt.exporter.engines import plugin_library
from nemotrt.exporter.lowering.external_data import data_path
from nemotrt.exporter.pipelines import build, estimates
from nemotrt.exporter.pipelines import check as checks
from nemotrt.exporter.pipelines.estimates import StageEstimate
from nemotrt.exporter.pipelines.quantize import Quantization, quantize_checkpoint

ROOT = Path(__file__).parents[2]
SCRIPT = ROOT / "scripts" / "estimates.py"
EXAMPLE = ROOT / "examples" / "tiny"
WIDER = {"hidden_size": 256, "vocab_size": 2048}
"""Weights that take more place than the graph's nodes."""


def estimated(checkpoint: Path, precision: str = "", **options: Any) -> dict[str, StageEstimate]:
    found = checks.check(checks.of_folder(checkpoint), precision, Path(), runtime="onnx", **options)
    return {stage.stage: stage for stage in found.estimates}


@pytest.mark.parametrize("precision", ["fp32", "fp16"])
@pytest.mark.parametrize("how", ["copy", "link"])
def test_what_is_written(tmp_path: Path, precision: str, how: str) -> None:
    checkpoint = write_checkpoint(tmp_path / "checkpoint", **WIDER)
    config = BuildConfig(
        checkpoint, tmp_path / "out", precision=precision, runtime="onnx", weights=how, validate=False
    )
    build.build(config)
    graph = tmp_path / "out" / "model.onnx"
    written = graph.stat().st_size + data_path(graph).stat().st_size
    stage = estimated(checkpoint, precision, link=how == "link")["lower"]
    assert stage.disk_bytes == pytest.approx(written, rel=0.1)
    layers = len(CONFIG["hybrid_override_pattern"])
    nodes = estimates.GRAPH_FILE + layers * estimates.GRAPH_LAYER
    assert stage.disk_bytes - nodes == data_path(graph).stat().st_size


def test_a_table_is_estimated_as_the_folder_that_it_is_of(checkpoint: Path, tmp_path: Path) -> None:
    folder = checks.of_folder(checkpoint)
    names = {"float32": "F32", "bfloat16": "BF16", "float16": "F16"}
    table = {name: [names[tensor.dtype], tensor.shape] for name, tensor in folder.stored.items()}
    (tmp_path / "table.json").write_text(json.dumps(table))
    subject = checks.of_table(checkpoint / "config.json", tmp_path / "table.json")
    assert checks.check(subject, "", Path()).estimates == checks.check(folder, "", Path()).estimates


def test_engines_are_estimated_for_runtimes_that_build_here(
    checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(checks, "engines", lambda *_: {"tensorrt-rtx": 2})
    found = checks.check(checks.of_folder(checkpoint), "", Path()).estimates
    engines = [(stage.stage, stage.runtime) for stage in found if stage.runtime]
    assert engines == [(name, "tensorrt-rtx") for name in ("kernels", "compile", "bundle")]
    alone = next(stage for stage in found if stage.stage == "lower").memory_bytes
    assert (
        next(stage for stage in found if stage.stage == "compile").memory_bytes
        > alone + estimates.ENGINE_MEMORY
    )


def test_memory_of_a_build(tmp_path: Path) -> None:
    """In a process of its own, which has loaded nothing else."""
    command = [sys.executable, SCRIPT, "run", EXAMPLE, tmp_path / "out", "--runtime", "onnx"]
    took = json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE).stdout)
    stages = estimated(EXAMPLE)
    assert list(stages) == list(took)
    for name, stage in stages.items():
        assert stage.memory_bytes == pytest.approx(took[name]["memory_bytes"], rel=0.25), name


def test_quantizing_is_a_stage_of_its_own(tmp_path: Path) -> None:
    stages = estimated(EXAMPLE, "fp8")
    assert list(stages) == ["load", "quantize", "trace", "lower", "validate", "bundle"]
    assert "quantize" not in estimated(EXAMPLE, "fp16")
    wanted = Quantization(None, "conservative", (), "auto")
    quantize_checkpoint(EXAMPLE, tmp_path / "fp8", wanted)
    written = (tmp_path / "fp8" / SINGLE).stat().st_size
    assert stages["quantize"].disk_bytes == pytest.approx(written, rel=0.05)
    assert "quantize" not in estimated(tmp_path / "fp8", "fp8")


def test_kernels_that_are_linked_already_take_nothing(
    checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = BuildConfig(Path(), Path(), precision="fp16")
    monkeypatch.setenv("NEMO_EXPORT_CACHE", str(tmp_path))
    monkeypatch.setattr(plugin_library, "is_shipped", lambda: False)
    assert not plugin_library.is_at_hand(config, (89, 120))
    plugin_library._place(config, (89, 120)).mkdir(parents=True)
    assert plugin_library.is_at_hand(config, (120, 89))
    assert not plugin_library.is_at_hand(config, (89,))
    for missing in (2, 0):
        monkeypatch.setattr(checks, "engines", lambda *_, missing=missing: {"tensorrt-rtx": missing})
        found = checks.check(checks.of_folder(checkpoint), "", Path()).estimates
        kernels = next(stage for stage in found if stage.stage == "kernels")
        assert (kernels.cpu_seconds > 0) == (missing > 0)
