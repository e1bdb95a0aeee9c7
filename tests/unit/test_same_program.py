"""Layers of one form have equal nodes in a right graph; a fault in one layer alone is found, and named."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import fp8_checkpoints
import numpy as np
import onnx_ir as ir
import pytest
from faults import Graph, broken

from nemotrt.exporter.config import BuildConfig
from nemotrt.exporter.runtime.graph_file import OnnxGraph
from nemotrt.exporter.stages.load import load
from nemotrt.exporter.stages.lower import lower
from nemotrt.exporter.stages.trace import trace
from nemotrt.exporter.validation.layer_forms import first_of_each_form, layer_forms
from nemotrt.exporter.validation.same_program import same_program_gate
from nemotrt.model.config import ModelConfig

EXAMPLE = Path(__file__).resolve().parents[2] / "examples" / "tiny"
"""Its Mamba layers are 0, 4 and 6, and so are those of Super's layout with 2, 7 and 9."""


class Right(NamedTuple):
    config: ModelConfig
    graph: Path


@pytest.fixture(scope="module", params=["fp32", "fp16", "bf16", "fp8"])
def right(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Right:
    folder = tmp_path_factory.mktemp(request.param)
    if request.param == "fp8":
        checkpoint = fp8_checkpoints.super_(folder / "checkpoint")
        return Right(load(checkpoint).config, fp8_checkpoints.lowered(checkpoint, folder)[0])
    model = load(EXAMPLE)
    config = BuildConfig(model.folder, folder, precision=request.param)
    lower(model, trace(model, config), folder / "model.onnx")
    return Right(model.config, folder / "model.onnx")


def differing(right: Right, tmp_path: Path, inject: Callable[[Graph], None]) -> tuple[float, str]:
    """The number of differing layers after a fault, and what the gate says of them."""
    for file in right.graph.parent.glob("model.onnx*"):
        shutil.copy(file, tmp_path)
    broken(tmp_path / "model.onnx", inject)
    gate = same_program_gate(right.config, OnnxGraph.read(tmp_path / "model.onnx"))
    assert gate.passed == (gate.value == 0)
    return gate.value, gate.output


def test_a_right_graph_has_one_program_for_each_form(right: Right) -> None:
    gate = same_program_gate(right.config, OnnxGraph.read(right.graph))
    assert (gate.value, gate.output) == (0, "all layers")
    assert len(first_of_each_form(right.config)) < len(right.config.layers)


def other_epsilon(graph: Graph) -> None:
    graph.named("layers.4.norm.rms_norm").attributes.add(ir.AttrFloat32("epsilon", 2e-5))


def bypass(graph: Graph, node: ir.Node) -> None:
    ir.convenience.replace_all_uses_with(node.outputs[0], node.inputs[0])
    graph.nodes.remove(node, safe=True)


def missing_op(graph: Graph) -> None:
    bypass(graph, graph.named("layers.4.mixer.norm.silu.Sigmoid"))


def last_op_missing(graph: Graph) -> None:
    """The residual connection of a layer: what it adds becomes its output."""
    node = graph.named("layers.4.add")
    ir.convenience.replace_all_uses_with(node.outputs[0], node.inputs[1])
    graph.nodes.remove(node, safe=True)


def other_op(graph: Graph) -> None:
    sigmoid = graph.named("layers.4.mixer.norm.silu.Sigmoid")
    softmax = graph.before(sigmoid, "Softmax", sigmoid.inputs[0], axis=-1)
    ir.convenience.replace_all_uses_with(sigmoid.outputs[0], softmax)
    graph.nodes.remove(sigmoid, safe=True)


def swapped_inputs(graph: Graph) -> None:
    scan = graph.named("layers.4.mixer.scan")
    b, c = scan.inputs[3:5]
    scan.replace_input_with(3, c)
    scan.replace_input_with(4, b)


def residual_of_another_layer(graph: Graph) -> None:
    add = graph.named("layers.4.add")
    add.replace_input_with(0, graph.named("layers.2.add").outputs[0])


def weight_of_another_layer(graph: Graph) -> None:
    out_proj = graph.named("layers.4.mixer.norm.mul_1")
    place = next(i for i, value in enumerate(out_proj.inputs) if value.is_initializer())
    out_proj.replace_input_with(place, graph.nodes.initializers["backbone.layers.0.mixer.norm.weight"])


def pool_of_another_layer(graph: Graph) -> None:
    pool = next(value for value in graph.nodes.inputs if value.name == "ssm_state.0")
    graph.feed(graph.named("layers.4.mixer.scan"), "ssm_state.4", pool)


def other_constant(graph: Graph) -> None:
    split = graph.named("layers.4.mixer.split_with_sizes")
    sizes = split.inputs[1].const_value.numpy()
    split.replace_input_with(1, graph.constant(split, sizes[::-1].copy()))


def other_body(graph: Graph) -> None:
    graph.named("layers.4.mixer.scan").overload = "wrong"
    body = next(f for f in graph.model.functions.values() if f.name == "NemoSelectiveScan")
    wrong = body.clone()
    wrong.overload = "wrong"
    graph.model.functions[wrong.identifier()] = wrong


def other_dtype(graph: Graph) -> None:
    bias = graph.nodes.initializers["backbone.layers.4.mixer.dt_bias"]
    wide = ir.tensor(graph.weight("layers.4.mixer.dt_bias").astype(np.float64), name=bias.name)
    bias.const_value, bias.dtype = wide, wide.dtype


FAULTS: dict[Callable[[Graph], None], str] = {
    other_epsilon: "norm.rms_norm, epsilon: 2e-05, not 1e-05",
    missing_op: "operator: Mul (mixer.norm.silu), not Sigmoid (mixer.norm.silu.Sigmoid)",
    last_op_missing: "add",
    other_op: "not Sigmoid (mixer.norm.silu.Sigmoid)",
    swapped_inputs: "mixer.scan, input 3: layers.4.mixer.unflatten_2, not layers.0.mixer.unflatten_1",
    residual_of_another_layer: "add, input 0: layers.2.add",
    weight_of_another_layer: "mixer.norm.mul_1, input 1: backbone.layers.0.mixer.norm.weight",
    pool_of_another_layer: "mixer.scan, input 7: ssm_state.0",
    other_constant: "operator: Constant",
    other_body: "operator: nemo:NemoSelectiveScan:wrong",
    other_dtype: "mixer.scan, input 6: ",
}
"""A fault in layer 4 alone → what the gate says of it."""


@pytest.mark.parametrize("inject", FAULTS, ids=lambda inject: inject.__name__)
def test_a_fault_in_one_layer_is_found_and_named(
    right: Right, tmp_path: Path, inject: Callable[[Graph], None]
) -> None:
    number, output = differing(right, tmp_path, inject)
    assert number >= 1
    assert output.startswith("layers.4 differs from layers.0: ")
    assert FAULTS[inject] in output


def test_a_fault_in_the_first_layer_makes_the_others_differ(right: Right, tmp_path: Path) -> None:
    first = ir.AttrFloat32("epsilon", 2e-5)
    number, output = differing(
        right, tmp_path, lambda graph: graph.named("0.norm.rms_norm").attributes.add(first)
    )
    assert number == right.config.layers.count("mamba") - 1
    assert "epsilon: 1e-05, not 2e-05" in output


def test_a_layer_without_nodes_differs(right: Right, tmp_path: Path) -> None:
    def rename(graph: Graph) -> None:
        for node in graph.nodes:
            node.name = node.name.replace("layers.4.", "elsewhere.")

    output = differing(right, tmp_path, rename)[1]
    assert output.startswith("layers.4 differs from layers.0: ")
    assert output.endswith("is in the other alone")


def test_names_inside_a_layer_do_not_matter(right: Right, tmp_path: Path) -> None:
    def rename(graph: Graph) -> None:
        for number, node in enumerate(graph.nodes):
            if node.name.startswith("layers.4."):
                node.name = f"layers.4.n{number}"
                for value in node.outputs:
                    value.name = value.name if value.is_graph_output() else f"v{number}.{value.index()}"

    assert differing(right, tmp_path, rename)[0] == 0


def test_a_layer_s_form_comes_from_the_configuration(tmp_path: Path) -> None:
    """A layer whose input is not rounded to FP8 is no form of its own: the configuration says that it is."""
    checkpoint = fp8_checkpoints.nano(tmp_path / "checkpoint")
    config, graph = load(checkpoint).config, fp8_checkpoints.lowered(checkpoint, tmp_path)[0]
    forms = layer_forms(config)
    bf16 = {index for index, form in forms.items() if form.kind == "mamba" and not form.fp8}
    assert bf16 == set(fp8_checkpoints.NANO_BF16)
    first = first_of_each_form(config)
    assert sorted(first.values()) == [0, 1, 4, 5]
    assert same_program_gate(config, OnnxGraph.read(graph)).value == 0

    def unrounded(graph: Graph) -> None:
        product = graph.named("layers.2.mixer.in_proj")
        product.replace_input_with(0, graph.named("layers.2.norm.to_1").outputs[0])
        for node in [node for node in graph.nodes if node.name.startswith("layers.2.mixer.in_proj.")]:
            if not any(value.uses() for value in node.outputs):
                graph.nodes.remove(node, safe=True)

    (tmp_path / "broken").mkdir()
    number, output = differing(Right(config, graph), tmp_path / "broken", unrounded)
    assert number == 1
    assert output.startswith("layers.2 differs from layers.0: ")
