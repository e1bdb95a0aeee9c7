"""Bisect: a right graph has no diverging value, and a fault is named by its layer, its op and the wrong input."""

from __future__ import annotations

import re
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import fp8_checkpoints
import numpy as np
import pytest
from faults import Graph, broken
from faults.attention import page_mix_up
from faults.experts import no_scaling_factor, one_expert_short
from faults.logits import scaled_logits
from faults.norms import gate_after_norm, one_norm_group
from faults.recurrence import fresh_reads_slot, stale_slot
from faults.weights import (
    dropped_conv_bias,
    dropped_dt_bias,
    dropped_skip,
    reversed_taps,
    shifted_a_log,
    swapped_experts,
    swapped_kv_heads,
    zeroed_expert,
)

from nemotrt.exporter.artifacts import TracedModel
from nemotrt.exporter.checkpoint.loaded_model import LoadedModel
from nemotrt.exporter.config import BuildConfig
from nemotrt.exporter.pipelines.validate import trace_for_bisection
from nemotrt.exporter.report.model import Bisection
from nemotrt.exporter.runtime.graph_file import OnnxGraph
from nemotrt.exporter.stages.load import load
from nemotrt.exporter.stages.lower import lower
from nemotrt.exporter.validation.parts.bisection import bisect
from nemotrt.exporter.validation.plan import workload_of
from nemotrt.exporter.validation.runners.base import PartSession


class Built(NamedTuple):
    """A graph, and its model as the bisection needs it: traced at the graph's precision and in FP32."""

    model: LoadedModel
    config: BuildConfig
    graph: Path
    traces: tuple[TracedModel, TracedModel]


@pytest.fixture(scope="module", params=["fp16", "bf16"])
def built(
    request: pytest.FixtureRequest, checkpoint: Path, tmp_path_factory: pytest.TempPathFactory
) -> Built:
    return build(checkpoint, tmp_path_factory.mktemp("graph"), request.param)


def build(checkpoint: Path, folder: Path, precision: str) -> Built:
    model = load(checkpoint)
    config = BuildConfig(checkpoint=checkpoint, output=folder, precision=precision)
    traces = trace_for_bisection(model, config)
    lower(model, traces[0], folder / "model.onnx")
    return Built(model, config, folder / "model.onnx", traces)


def bisection_of(built: Built, *, seed: int = 0, graph: Path | None = None) -> Bisection:
    model, config, path, traces = built
    return bisect(model, config, OnnxGraph.read(graph or path), workload_of(model, config, seed), *traces)


def scaled_down_proj(graph: Graph) -> None:
    graph.weights["backbone.layers.3.mixer.down_proj.weight"] *= 1.05


# The faults of one line are in different parts of one graph, because each part is compared alone.
GROUPS: list[dict[Any, tuple[str, str]]] = [
    {
        dropped_skip: ("layers.0.mixer.scan", "layers.0.mixer.D: DIFFERS"),
        zeroed_expert: ("layers.1.mixer.experts", "layers.1.mixer.experts.up: DIFFERS"),
        swapped_kv_heads: ("layers.2.mixer.k_proj", "layers.2.mixer.k_proj.weight: DIFFERS"),
        scaled_down_proj: ("layers.3.mixer.down_proj", "layers.3.mixer.down_proj.weight: DIFFERS"),
        scaled_logits: (r"head.wrong.\d+", "lost.logits: not compared"),
    },
    {
        reversed_taps: ("layers.0.mixer.conv", "layers.0.mixer.conv1d.weight: DIFFERS"),
        swapped_experts: ("layers.1.mixer.experts", "layers.1.mixer.experts.down: DIFFERS"),
        page_mix_up: ("layers.2.mixer.attention", "wrong.*: not compared"),
    },
    {
        gate_after_norm: ("layers.0.mixer.norm.unflatten", "layers.0.mixer.norm.to: agrees"),
        no_scaling_factor: ("layers.1.mixer.experts", "layers.1.mixer.gate: agrees"),
    },
    {
        shifted_a_log: ("layers.0.mixer.scan", "layers.0.mixer.A: DIFFERS"),
        one_expert_short: ("layers.1.mixer.experts", "layers.1.mixer.gate: agrees"),
    },
    {dropped_dt_bias: ("layers.0.mixer.scan", "layers.0.mixer.dt_bias: DIFFERS")},
    {dropped_conv_bias: ("layers.0.mixer.conv", "layers.0.mixer.conv1d.bias: DIFFERS")},
    {one_norm_group: ("layers.0.mixer.norm.unflatten", "PyTorch's is")},
    {stale_slot: (r"layers.0.mixer.scan.Identity.\d+", "ssm_state.0: the state")},
    {fresh_reads_slot: ("layers.0.mixer.scan", "wrong.*: not compared")},
]


@pytest.mark.parametrize("faults", GROUPS, ids=lambda faults: "-".join(fault.__name__ for fault in faults))
def test_each_fault_is_named(built: Built, tmp_path: Path, faults: dict[Any, tuple[str, str]]) -> None:
    copy = shutil.copytree(built.graph.parent, tmp_path / "broken") / "model.onnx"
    for fault in faults:
        broken(copy, fault)
    diverging = bisection_of(built, graph=copy).diverging
    for value, (node, line) in zip(diverging, faults.values(), strict=True):
        assert re.fullmatch(node, value.node)
        assert any(re.search(line, read) for read in value.reads), value.reads
        assert value.diverges
        assert value.tensor.startswith((f"{value.place}.", "next.", "logits"))


@pytest.mark.parametrize("seed", range(3))
def test_nothing_diverges_in_a_right_graph(built: Built, seed: int) -> None:
    bisected = bisection_of(built, seed=seed)
    assert not bisected.diverging
    assert not bisected.marking_changed
    assert bisected.nearest
    assert 0 < bisected.nearest.limit_fraction < 0.7
    # PyTorch has no value for the sigmoid inside each SiLU.
    assert (bisected.num_unmatched, bisected.num_values > 100) == (2, True)


@pytest.mark.parametrize("precision", ["fp32", "fp8"])
def test_nothing_diverges_in_other_precisions(tmp_path: Path, checkpoint: Path, precision: str) -> None:
    (tmp_path / "graph").mkdir()
    source = checkpoint if precision == "fp32" else fp8_checkpoints.small(tmp_path / "fp8")
    bisected = bisection_of(build(source, tmp_path / "graph", precision))
    assert not bisected.diverging
    assert bisected.num_values > 90


def test_a_forgotten_fp8_scale_is_named(tmp_path: Path) -> None:
    (tmp_path / "graph").mkdir()
    built = build(fp8_checkpoints.small(tmp_path / "fp8"), tmp_path / "graph", "fp8")

    scale = Graph(built.graph).weights["backbone.layers.4.mixer.in_proj.weight_scale"]
    scale *= 1.1
    scale.flush()
    (value,) = bisection_of(built).diverging
    assert value.node == "layers.4.mixer.in_proj"


def test_a_value_that_is_not_finite_diverges(built: Built, tmp_path: Path) -> None:
    copy = shutil.copytree(built.graph.parent, tmp_path / "broken") / "model.onnx"

    def one_nan(graph: Graph) -> None:
        graph.weights["backbone.layers.3.mixer.up_proj.weight"][5, 7] = np.nan

    broken(copy, one_nan)
    (value,) = bisection_of(built, graph=copy).diverging
    assert (value.node, value.error, value.candidate) == ("layers.3.mixer.up_proj", None, None)
    assert value.limit_fraction == float("inf")


class Disturbed(PartSession):
    """A runtime that computes something else when a value inside layer 3 is an output."""

    def run(self, feeds: Mapping[str, Any]) -> dict[str, Any]:
        shown = super().run(feeds)
        if "layers.3.mixer.up_proj" in shown:
            shown["layers.3.add"] = np.nextafter(shown["layers.3.add"], np.float32(np.inf))
        return shown


def test_marking_that_changes_the_result_is_reported(built: Built) -> None:
    model, config, graph, traces = built
    disturbed = bisect(
        model, config, OnnxGraph.read(graph), workload_of(model, config, 0), *traces, open_part=Disturbed
    )
    assert disturbed.marking_changed == ("layers.3",)
