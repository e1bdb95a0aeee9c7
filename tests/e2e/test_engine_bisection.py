"""Parts of a graph, inner values marked as outputs, are engines that TensorRT-RTX builds without a GPU."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest
from checkpoints import write_checkpoint
from host_library import library
from test_engine import KERNEL_SIZES

from nemotrt.exporter.config import BuildConfig
from nemotrt.exporter.engines.builder_process import run_builder
from nemotrt.exporter.runtime.backends import backend
from nemotrt.exporter.runtime.graph_file import OnnxGraph
from nemotrt.exporter.stages.load import load
from nemotrt.exporter.stages.lower import lower
from nemotrt.exporter.stages.trace import trace
from nemotrt.exporter.validation.parts.engine_parts import part_profile, part_request
from nemotrt.exporter.validation.parts.part_run import mixed_steps
from nemotrt.exporter.validation.parts.subgraphs import split
from nemotrt.exporter.validation.plan import workload_of

pytestmark = [
    pytest.mark.tensorrt,
    pytest.mark.skipif(
        importlib.util.find_spec("tensorrt_rtx") is None,
        reason="TensorRT-RTX is not installed: pip install 'nemo-export[rtx]'",
    ),
]

KINDS = ("embeddings", "layers.0", "layers.1", "layers.2", "layers.3", "head")
"""A part of each kind."""


@pytest.mark.parametrize("precision", ["fp16", "bf16"])
def test_marked_parts_build(tmp_path: Path, precision: str) -> None:
    checkpoint = write_checkpoint(
        tmp_path / "checkpoint", **KERNEL_SIZES, mamba_num_heads=2, moe_latent_size=32
    )
    model, graph = load(checkpoint), tmp_path / "graph" / "model.onnx"
    config = BuildConfig(checkpoint=checkpoint, output=graph.parent, precision=precision)
    graph.parent.mkdir()
    lower(model, trace(model, config), graph)
    driven = workload_of(model, config, 0)
    used = backend("tensorrt-rtx")
    profile = part_profile(mixed_steps(driven), driven)
    parts = {part.name: part for part in split(OnnxGraph.read(graph))}
    for name in KINDS:
        part = parts[name]
        folder = tmp_path / name
        folder.mkdir()
        # An inner value without a type in the graph cannot be an output of an engine.
        values = (value for node in part.model.graph for value in node.outputs if value.dtype)
        marked = part.graph(value.name for value in values)
        request = part_request(marked, profile, used, library().path, folder, (89,))
        result = run_builder(request, used)
        assert result.version
        assert Path(request.output).stat().st_size > 0
        assert len(request.plugins) == len(part.ops)
