"""The gates on a graph's dtypes name each weight, pool and input of an op that has another dtype or is cast to one."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import onnx
import onnx_ir as ir
import pytest
from onnx import ModelProto, TensorProto, helper

from nemotrt.exporter.checkpoint.loaded_model import LoadedModel
from nemotrt.exporter.config import BuildConfig
from nemotrt.exporter.stages.load import load
from nemotrt.exporter.stages.lower import lower
from nemotrt.exporter.stages.trace import trace
from nemotrt.exporter.validation.gates import dtype_gates, expected_dtypes


@pytest.fixture(scope="module")
def loaded(checkpoint: Path) -> LoadedModel:
    return load(checkpoint)


@pytest.fixture(scope="module")
def config(loaded: LoadedModel, tmp_path_factory: pytest.TempPathFactory) -> BuildConfig:
    return BuildConfig(loaded.folder, tmp_path_factory.mktemp("dtypes"), precision="fp16")


@pytest.fixture(scope="module")
def graph(loaded: LoadedModel, config: BuildConfig) -> ModelProto:
    lower(loaded, trace(loaded, config), config.output / "model.onnx")
    return onnx.load(config.output / "model.onnx", load_external_data=False)


def diverging(graph: ModelProto, loaded: LoadedModel, config: BuildConfig) -> list[tuple[str, float]]:
    return [
        (gate.output, gate.value)
        for gate in dtype_gates(ir.from_proto(graph), expected_dtypes(loaded, config))
        if not gate.passed
    ]


def test_a_right_graph_keeps_every_dtype(graph: ModelProto, loaded: LoadedModel, config: BuildConfig) -> None:
    assert diverging(graph, loaded, config) == []
    assert {gate.output for gate in dtype_gates(ir.from_proto(graph), expected_dtypes(loaded, config))} == {
        "weights", "pools", "ops' FP32 inputs",
    }  # fmt: skip


def narrow_weight(graph: ModelProto) -> None:
    weight = next(t for t in graph.graph.initializer if t.name.endswith("layers.0.mixer.dt_bias"))
    weight.data_type = TensorProto.FLOAT16


def lose_weight(graph: ModelProto) -> None:
    weights = graph.graph.initializer
    weights.remove(next(t for t in weights if t.name.endswith("layers.0.mixer.D")))


def narrow_state(graph: ModelProto) -> None:
    for value in (*graph.graph.input, *graph.graph.output):
        if value.name.endswith("ssm_state.4"):
            value.type.tensor_type.elem_type = TensorProto.FLOAT16


def route_in_half(graph: ModelProto) -> None:
    """The router's product is rounded on its way to the experts."""
    moe = next(node for node in graph.graph.node if node.op_type == "NemoMoeDispatch")
    logits = moe.input[1]
    for made in (
        helper.make_node("Cast", [logits], ["half"], to=TensorProto.FLOAT16),
        helper.make_node("Cast", ["half"], ["rounded"], to=TensorProto.FLOAT),
    ):
        graph.graph.node.insert(list(graph.graph.node).index(moe), made)
    graph.graph.value_info.append(helper.make_tensor_value_info("rounded", TensorProto.FLOAT, None))
    moe.input[1] = "rounded"


@pytest.mark.parametrize(
    ("change", "found"),
    [
        # Both as a weight, and as what the scan takes.
        (narrow_weight, [("backbone.layers.0.mixer.dt_bias", 1.0), ("backbone.layers.0.mixer.dt_bias", 1.0)]),
        (lose_weight, [("backbone.layers.0.mixer.D", 1.0)]),
        (narrow_state, [("ssm_state.4", 2.0)]),
        (route_in_half, [("rounded", 1.0)]),
    ],
)
def test_another_dtype_is_named(
    graph: ModelProto,
    loaded: LoadedModel,
    config: BuildConfig,
    change: Callable[[ModelProto], None],
    found: list[tuple[str, float]],
) -> None:
    changed = ModelProto()
    changed.CopyFrom(graph)
    change(changed)
    assert diverging(changed, loaded, config) == found
