"""Whether layers of one form are the same program: in the graph they may differ in their weights' values alone.

A layer's form follows from the model's configuration, never from the graph, where a wrong layer would define a form of
its own.
"""

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import count, zip_longest

import onnx_ir as ir

from nemotrt.exporter.report.model import Gate, Metric
from nemotrt.exporter.runtime.graph_file import OnnxGraph
from nemotrt.exporter.validation.layer_forms import first_of_each_form, layer_forms
from nemotrt.model.config import ModelConfig
from nemotrt.plugins.contract import EMBEDDINGS, NEXT, LayerName

SAME_PROGRAM = "same program"
"""The scenario in which the nodes of layers are compared with each other."""

MAX_SHOWN = 8
"""Values of a constant that a message shows."""


@dataclass(frozen=True)
class _Part:
    """One part of a node. Two are equal if they mean the same to their layers."""

    meaning: str
    shown: str = field(compare=False)
    """How a message shows it."""


_Node = dict[str, _Part]
"""`operator`, `input 0`, `epsilon`, `output 0` … → the part."""


def same_program_gate(config: ModelConfig, graph: OnnxGraph) -> Gate:
    """The gate on the number of layers that differ from the first layer of their form; it says how the first does."""
    programs = _programs(config, graph.model.graph)
    first = first_of_each_form(config)
    differences = [
        f"layers.{index} differs from layers.{first[form]}: {difference}"
        for index, form in layer_forms(config).items()
        if (difference := _difference(programs[index], programs[first[form]]))
    ]
    output = differences[0] if differences else "all layers"
    return Gate(SAME_PROGRAM, output, Metric.PROGRAM, float(len(differences)), 0.0)


def _difference(nodes: Sequence[_Node], expected: Sequence[_Node]) -> str:
    """The first difference of two programs in words; empty if there is none."""
    for ours, theirs in zip_longest(nodes, expected, fillvalue=_Node()):
        if not (ours and theirs):
            return f"{(ours or theirs)['operator'].shown} is in {'it' if ours else 'the other'} alone"
        for part in ours | theirs:
            one, other = ours.get(part), theirs.get(part)
            if one != other:
                one_shown, other_shown = (side.shown if side else "missing" for side in (one, other))
                return f"{ours['node'].shown}, {part}: {one_shown}, not {other_shown}"
    return ""


def _programs(config: ModelConfig, graph: ir.Graph) -> dict[int, list[_Node]]:
    """The nodes of each layer in the graph's order, which is topological; empty for a layer that has no node."""
    nodes: dict[str, list[ir.Node]] = defaultdict(list)
    for node in graph:
        layer = LayerName.parse(node.name or "")
        nodes[layer.part if layer else ""].append(node)
    programs, before = {}, EMBEDDINGS
    for index in config.numbered_layers:
        part = f"layers.{index}"
        previous = nodes[before][-1:]  # The last node of a part computes what flows on.
        programs[index] = _LayerReader(index, previous).read(nodes[part])
        before = part
    return programs


class _LayerReader:
    """Describes the nodes of one layer without the layer's index and without names inside the layer."""

    def __init__(self, index: int, previous: Sequence[ir.Node]) -> None:
        """`previous` has the last node of the part before the layer."""
        self._index, self._numbers = index, count()
        self._meanings: dict[ir.Value, str] = {
            output: "the output of the part before" for node in previous for output in node.outputs
        }

    def read(self, nodes: Sequence[ir.Node]) -> list[_Node]:
        """The layer's nodes; values inside the layer are numbered in their order."""
        return [self._node(node) for node in nodes]

    def _node(self, node: ir.Node) -> _Node:
        name = (node.name or "").removeprefix(f"layers.{self._index}.")
        operator = ":".join(filter(None, node.op_identifier()))
        parts = {
            "node": _Part("", name),
            "operator": _Part(operator, f"{operator} ({name})"),
        }
        parts |= {f"input {i}": self._input(value) for i, value in enumerate(node.inputs)}
        parts |= {key: _attribute(value) for key, value in sorted(node.attributes.items())}
        for i, value in enumerate(node.outputs):
            pool = self._own(str(value.name)) if value.is_graph_output() else "a value inside the layer"
            parts[f"output {i}"] = _Part(pool, pool)
            self._meanings[value] = f"value {next(self._numbers)}"
        return parts

    def _input(self, value: ir.Value | None) -> _Part:
        if value is None:
            return _Part("", "nothing")
        name = str(value.name)
        if value in self._meanings:
            return _Part(self._meanings[value], name)
        constant = value.const_value
        if constant is not None and not isinstance(constant, ir.ExternalTensor):
            return _constant(constant)
        dtype, shape = (constant.dtype, constant.shape) if constant else (value.dtype, value.shape)
        described = f"{self._own(name)} {dtype} {shape}"
        return _Part(described, described)

    def _own(self, name: str) -> str:
        """The name of a weight, a pool or another input, without the layer's index if it is this layer's own."""
        layer = LayerName.parse(name)
        prefix = NEXT if name.startswith(NEXT) else ""
        return f"{prefix}{layer.inner}" if layer and layer.layer == self._index else name


def _constant(tensor: ir.TensorProtocol) -> _Part:
    values = tensor.numpy()
    meaning = f"{tensor.dtype} {values.shape} {values.tobytes().hex()}"
    return _Part(meaning, f"constant {values.ravel()[:MAX_SHOWN].tolist()}")


def _attribute(attribute: ir.Attr) -> _Part:
    if attribute.type is ir.AttributeType.TENSOR:
        return _constant(attribute.as_tensor())
    value = attribute.value
    return _Part(f"{attribute.type} {value!r}", f"{value:g}" if isinstance(value, float) else str(value))
