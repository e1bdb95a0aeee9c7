"""A graph split into its parts (embeddings, layers, head), each of which can run alone on chosen inputs.

The names of nodes (`layers.7.mixer.in_proj`) decide to which part a node belongs.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import groupby
from pathlib import Path

import onnx_ir as ir

from nemotrt.exporter.errors import BundleError
from nemotrt.exporter.runtime.graph_file import OnnxGraph
from nemotrt.exporter.validation.runners.base import router_logits_names, with_forced_routing
from nemotrt.plugins.contract import EMBEDDINGS, HEAD, LOGITS, NEXT, DType, LayerName
from nemotrt.plugins.spec import DOMAIN


@dataclass(frozen=True)
class GraphPart:
    """One part of a graph, as a model that refers to the same weight files."""

    name: str
    """`embeddings`, `layers.7` or `head`."""
    model: ir.Model
    path: Path
    """The whole graph's file."""
    flow_in: str
    """The value that comes from the part before; `input_ids` for the embeddings."""
    flow_out: str
    """The value that goes to the part after; `logits` for the head."""
    addend: str
    """The value that a layer adds to its input; empty for the embeddings and the head."""
    pools: tuple[str, ...]

    @property
    def outputs(self) -> tuple[str, ...]:
        """The part's output, the value that a layer adds to its input, and the pools after the step."""
        return tuple(str(value.name) for value in self.model.graph.outputs)

    @cached_property
    def values(self) -> dict[str, ir.Value]:
        """Every value of the part by name, weights included."""
        return dict(ir.convenience.create_value_mapping(self.model.graph, include_subgraphs=False))

    @property
    def router_logits(self) -> tuple[str, ...]:
        """The value by which the part chooses experts; empty for a part without experts."""
        return router_logits_names(self.model)

    @property
    def ops(self) -> tuple[ir.Node, ...]:
        """The nodes of our own ops."""
        return tuple(node for node in self.model.graph if node.domain == DOMAIN)

    def graph(self, extra_outputs: Iterable[str] = ()) -> OnnxGraph:
        """The part as a graph of its own, with further values as outputs."""
        names = tuple(dict.fromkeys((*self.outputs, *extra_outputs)))
        return self._graph(self.model.graph.inputs, [self.values[name] for name in names])

    def graph_with_forced_routing(self) -> OnnxGraph:
        """The part as a graph that also takes router logits to be forced, and returns its own."""
        return OnnxGraph(ir.to_proto(with_forced_routing(self.model)), self.path)

    def op_graph(self, node: ir.Node) -> OnnxGraph:
        """One node of the part as a graph of its own."""
        inputs = [value for value in node.inputs if value and not value.is_initializer()]
        return self._graph(inputs, node.outputs)

    def _graph(self, inputs: Sequence[ir.Value], outputs: Sequence[ir.Value]) -> OnnxGraph:
        return OnnxGraph(ir.to_proto(_extract(self.model, inputs, outputs)), self.path)

    def is_fp32(self, name: str) -> bool:
        """Whether the graph keeps the value in FP32."""
        return self.values[name].dtype == DType.FLOAT32.onnx

    def axes(self, name: str) -> tuple[str, ...]:
        """A value's sizes; an axis that may vary has the contract's name: T, R, S or K."""
        shape = self.values[name].shape
        return tuple(str(size.value if isinstance(size, ir.SymbolicDim) else size) for size in shape or ())


def split(graph: OnnxGraph) -> list[GraphPart]:
    """Every part in the order in which tokens pass them; raises BundleError if nodes are not named for parts."""
    groups = [(name, list(nodes)) for name, nodes in groupby(graph.model.graph, _part_name)]
    names = [name for name, _ in groups]
    if len(set(names)) != len(names) or EMBEDDINGS not in names or HEAD not in names:
        raise BundleError("the graph's nodes are not named for the layers they belong to")
    return [_part(graph, name, nodes) for name, nodes in groups]


def _part_name(node: ir.Node) -> str:
    name = node.name or ""
    layer = LayerName.parse(name)
    return layer.part if layer else name


def _part(graph: OnnxGraph, name: str, nodes: Sequence[ir.Node]) -> GraphPart:
    inside = set(nodes)
    read = dict.fromkeys(value for node in nodes for value in node.inputs if value)
    inputs = [value for value in read if not value.is_initializer() and value.producer() not in inside]
    flows_in = [value for value in inputs if value.producer()] or inputs[:1]
    results = [value for value in graph.model.graph.outputs if value.producer() in inside]
    flows_out = [
        value
        for node in nodes
        for value in node.outputs
        if value.name == LOGITS or any(use.node not in inside for use in value.uses())
    ]
    if len(flows_in) != 1 or len(flows_out) != 1:
        raise BundleError(f"{name} of the graph exchanges more than one value with its neighbors")
    (flow_in,), (flow_out,) = flows_in, flows_out
    outputs = dict.fromkeys([flow_out, *results])
    addend = None
    if name not in (EMBEDDINGS, HEAD):
        last = flow_out.producer()
        assert last is not None
        addend = next(value for value in last.inputs if value and value is not flow_in)
        outputs[addend] = None
    output_names = {value.name for value in results}
    return GraphPart(
        name,
        _extract(graph.model, inputs, list(outputs)),
        graph.path,
        str(flow_in.name),
        str(flow_out.name),
        str(addend.name) if addend else "",
        tuple(str(value.name) for value in inputs if f"{NEXT}{value.name}" in output_names),
    )


def _extract(model: ir.Model, inputs: Sequence[ir.Value], outputs: Sequence[ir.Value]) -> ir.Model:
    graph = ir.convenience.extract(model.graph, inputs, outputs)
    operators = {node.op_identifier() for node in graph}
    functions = [model.functions[name] for name in model.functions if name in operators]
    return ir.Model(graph, ir_version=model.ir_version, functions=functions)
