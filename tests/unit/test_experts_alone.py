"""Layers alone compare every expert and every router, whatever the routers choose."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from checkpoints import SMALL_LIMITS, write_checkpoint
from faults import Graph, broken, experts
from safetensors.torch import load_file, save_file

from nemotrt.exporter.config import BuildConfig
from nemotrt.exporter.report.model import Gate
from nemotrt.exporter.runtime.graph_file import OnnxGraph
from nemotrt.exporter.stages.load import load
from nemotrt.exporter.stages.lower import lower
from nemotrt.exporter.stages.trace import trace
from nemotrt.exporter.validation.validate import validate_parts

NUM_EXPERTS = 64
"""So many that a wrong router chooses other experts for every token."""


def failed(folder: Path, precision: str, inject: Callable[[Graph], None], **limits: int) -> list[Gate]:
    """The gates that fail for layers alone; the routers never choose the last two experts."""
    checkpoint = write_checkpoint(
        folder / "checkpoint", hybrid_override_pattern="E", n_routed_experts=NUM_EXPERTS
    )
    tensors = load_file(checkpoint / "model.safetensors")
    bias = next(tensor for name, tensor in tensors.items() if name.endswith("e_score_correction_bias"))
    bias[:], bias[-2:] = 0, -0.9
    save_file(tensors, checkpoint / "model.safetensors")
    model = load(checkpoint)
    config = BuildConfig(checkpoint, folder, precision, page_size=16, **SMALL_LIMITS | limits)
    graph = folder / "model.onnx"
    lower(model, trace(model, config), graph)
    broken(graph, inject)
    report = validate_parts(model, config, OnnxGraph.read(graph))
    return [gate for gate in report.gates if not gate.passed]


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_a_router_that_is_wrong_for_every_token_fails(tmp_path: Path, precision: str) -> None:
    outputs = {gate.output for gate in failed(tmp_path, precision, experts.negated_routers)}
    assert "layers.0 router" in outputs


@pytest.mark.parametrize("max_tokens", [SMALL_LIMITS["max_tokens"], 5])
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_an_expert_that_no_token_chooses_is_compared(tmp_path: Path, precision: str, max_tokens: int) -> None:
    gates = failed(tmp_path, precision, experts.last_expert_twice, max_tokens=max_tokens)
    assert {gate.scenario for gate in gates} == {"envelope, layers alone"}


def test_a_right_graph_passes_with_few_tokens_in_a_step(tmp_path: Path) -> None:
    assert not failed(tmp_path, "bf16", lambda graph: None, max_tokens=5)
