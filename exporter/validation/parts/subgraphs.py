"""A graph cut where its layers meet, so that a part of it runs alone on inputs of one's choice.

Nodes carry their place in the model in their names (`layers.7.mixer.in_proj`): that is all that is read here.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property
from itertools import groupby
from typing import TYPE_CHECKING

from nemotrt.exporter.errors import BundleError
from nemotrt.plugins.contract import LayerName
from nemotrt.plugins.spec import DOMAIN

if TYPE_CHECKING:
    from onnx import ModelProto, NodeProto, TensorProto, ValueInfoProto


@dataclass(frozen=True)
class Cut:
    """One part of a graph, as a model of its own on the same external data."""

    place: str
    """`embeddings`, `layers.7` or `head`."""
    model: ModelProto
    flow_in: str
    """The value in which the tokens come in; `input_ids` for the first part."""
    flow_out: str
    mixed: str
    """What a layer adds to what came in; empty for a part that is no layer."""
    pools: tuple[str, ...]

    def showing(self, values: Iterable[str]) -> ModelProto:
        """The part with further values of it as outputs."""
        from onnx import ModelProto

        shown = ModelProto()
        shown.CopyFrom(self.model)
        already = {value.name for value in self.model.graph.output}
        shown.graph.output.extend(self.types[name] for name in values if name not in already)
        return shown

    @property
    def edges(self) -> tuple[str, ...]:
        """What the part gives: the tokens' values, what it adds to them, and its pools after the step."""
        mixed = (self.mixed,) if self.mixed else ()
        return (self.flow_out, *mixed, *(f"next.{pool}" for pool in self.pools))

    @property
    def router_logits(self) -> str:
        """The value by which the part chooses experts, empty where it chooses none."""
        return next((n.input[1] for n in self.model.graph.node if n.op_type == "NemoMoeDispatch"), "")

    @cached_property
    def types(self) -> dict[str, ValueInfoProto]:
        """The type and shape of every value of the part that is no weight."""
        graph = self.model.graph
        return {value.name: value for value in (*graph.value_info, *graph.input, *graph.output)}

    @cached_property
    def weights(self) -> dict[str, TensorProto]:
        """Weights and constants of the part, by their names."""
        return {tensor.name: tensor for tensor in self.model.graph.initializer}

    def axis(self, value: str) -> str:
        """What the first axis of a value counts, by the contract's names: T, R, S or K; empty where it is fixed."""
        sizes = self.types[value].type.tensor_type.shape.dim
        return sizes[0].dim_param if sizes else ""

    @property
    def ops(self) -> tuple[NodeProto, ...]:
        """The nodes of our own ops."""
        return tuple(node for node in self.model.graph.node if node.domain == DOMAIN)

    def only(self, node: NodeProto) -> ModelProto:
        """One node of the part, as a model of its own on the same external data."""
        taken = list(dict.fromkeys(name for name in node.input if name))
        inputs = [self.types[name] for name in taken if name not in self.weights]
        found = _model(self.model, [node], inputs, [self.types[name] for name in node.output], set())
        found.graph.initializer.extend(self.weights[name] for name in taken if name in self.weights)
        return found


def cuts(model: ModelProto) -> list[Cut]:
    """Every part in the order in which tokens pass them; raises BundleError on a graph that has no such parts."""
    groups = [(place, list(nodes)) for place, nodes in groupby(model.graph.node, _place)]
    places = [place for place, _ in groups]
    if len(set(places)) != len(places) or "embeddings" not in places or "head" not in places:
        raise BundleError("the graph's nodes are not named for the layers they belong to")
    return [_cut(model, place, nodes) for place, nodes in groups]


def _place(node: NodeProto) -> str:
    layer = LayerName.parse(node.name)
    return layer.part if layer else node.name


def _cut(model: ModelProto, place: str, nodes: list[NodeProto]) -> Cut:
    graph = model.graph
    typed = {value.name: value for value in (*graph.value_info, *graph.input, *graph.output)}
    stored = {tensor.name for tensor in graph.initializer}
    inside = {name for node in nodes for name in node.output}
    taken = list(dict.fromkeys(name for node in nodes for name in node.input if name))
    outer = [name for name in taken if name not in inside and name not in stored]
    edges = {value.name for value in graph.input}
    flowing = [name for name in outer if name not in edges] or ["input_ids"]
    results = [value.name for value in graph.output if value.name in inside]
    after = {name for node in graph.node if _place(node) != place for name in node.input}
    leaving = [name for name in inside if name in after]
    flow_out = leaving[0] if leaving else "logits"
    if len(flowing) != 1 or len(leaving) > 1:
        raise BundleError(f"{place} of the graph takes or gives more than one value of its neighbours")
    results = [flow_out, *(name for name in results if name != flow_out)]
    cut = _model(model, nodes, [typed[name] for name in outer], [typed[name] for name in results], inside)
    cut.graph.initializer.extend(tensor for tensor in graph.initializer if tensor.name in set(taken))
    last = next(node for node in nodes if flow_out in node.output)
    mixed = "" if not place.startswith("layers.") else next(n for n in last.input if n != flowing[0])
    if mixed:
        cut.graph.output.append(typed[mixed])
    pools = tuple(name for name in outer if f"next.{name}" in inside)
    return Cut(place, cut, flowing[0], flow_out, mixed, pools)


def _model(
    model: ModelProto,
    nodes: list[NodeProto],
    inputs: list[ValueInfoProto],
    outputs: list[ValueInfoProto],
    inside: set[str],
) -> ModelProto:
    from onnx import helper

    graph = helper.make_graph(nodes, "part", inputs, outputs)
    graph.value_info.extend(value for value in model.graph.value_info if value.name in inside)
    return helper.make_model(
        graph, ir_version=model.ir_version, opset_imports=model.opset_import, functions=model.functions
    )
