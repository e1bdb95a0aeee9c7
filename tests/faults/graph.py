"""A correct graph that can be broken, and what a fault is."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ml_dtypes  # noqa: F401  registers bfloat16 with NumPy
import numpy as np
import onnx
import onnx_ir as ir

from nemotrt.plugins import onnx_op
from nemotrt.plugins.contract import EMBEDDINGS, HEAD
from nemotrt.plugins.spec import OpSpec

FIRST, LAST, AXIS = np.array([0]), np.array([-1]), np.array([0])
END = np.array([1 << 30])


class Graph:
    """A graph whose nodes and weights can be changed; weights are mapped from the file."""

    def __init__(self, path: Path) -> None:
        self.model = ir.load(path)
        self.nodes = self.model.graph
        self.weights: dict[str, np.ndarray] = {}
        for name, value in self.nodes.initializers.items():
            tensor = value.const_value
            if isinstance(tensor, ir.ExternalTensor):
                shape = tuple(tensor.shape.numpy())
                self.weights[name] = np.memmap(tensor.path, tensor.dtype.numpy(), "r+", tensor.offset, shape)

    def weight(self, ending: str) -> np.ndarray:
        """The first weight whose name has this ending."""
        return next(array for name, array in self.weights.items() if name.endswith(ending))

    def op(self, op_type: str) -> ir.Node:
        """The first node of this type."""
        return next(node for node in self.nodes if node.op_type == op_type)

    def named(self, ending: str) -> ir.Node:
        """The first node whose name has this ending."""
        return next(node for node in self.nodes if node.name and node.name.endswith(ending))

    def before(
        self, node: ir.Node, op_type: str, *operands: ir.Value | np.ndarray, **attributes: Any
    ) -> ir.Value:
        """The result of a new node in front of `node`, named for the same layer."""
        inputs = [value if isinstance(value, ir.Value) else self.constant(node, value) for value in operands]
        made = ir.node(op_type, inputs, attributes, name=f"{node.name}.{op_type}.{len(self.nodes)}")
        made.outputs[0].name = f"wrong.{len(self.nodes)}"
        self.nodes.insert_before(node, made)
        return made.outputs[0]

    def constant(self, node: ir.Node, values: np.ndarray) -> ir.Value:
        """A new constant in front of `node`."""
        made = ir.node("Constant", [], {"value": ir.tensor(values)}, name=f"{node.name}.{len(self.nodes)}")
        made.outputs[0].name = f"constant.wrong.{len(self.nodes)}"
        self.nodes.insert_before(node, made)
        return made.outputs[0]

    def feed(self, node: ir.Node, name: str, value: ir.Value) -> None:
        """Replace the input of a node that has this name."""
        node.replace_input_with([taken.name for taken in node.inputs if taken].index(name), value)

    def step_input(self, name: str) -> ir.Value:
        """An input of the graph."""
        return next(value for value in self.nodes.inputs if value.name == name)

    def after(
        self, value: ir.Value, op_type: str, *operands: ir.Value | np.ndarray, **attributes: Any
    ) -> ir.Value:
        """Replace a value for all that read it by the result of a new node on it and `operands`."""
        uses = value.uses()
        made = self.before(next(use.node for use in uses), op_type, value, *operands, **attributes)
        for use in uses:
            use.node.replace_input_with(use.idx, made)
        return made

    def with_body(
        self, spec: OpSpec, sizes: dict[str, int] | None = None, **changes: float
    ) -> tuple[ir.Node, ir.Function]:
        """The first node of an op and a body of its own for it, both with other attributes or sizes."""
        node = self.op(spec.name)
        attributes = {name: node.attributes[name].value for name in spec.attributes} | changes
        shapes = [tuple(value.shape) for value in node.inputs]
        body = onnx_op.function(spec, spec.sizes(shapes) | (sizes or {}), attributes)
        body.overload = node.overload = "wrong"
        self.model.functions[body.identifier()] = body
        for name in changes:
            node.attributes[name] = body.attributes[name]
        return node, body

    def put_out(self, old: ir.Value, new: ir.Value) -> None:
        """Make `new` the graph's output in place of `old`."""
        new.name, old.name = old.name, f"lost.{old.name}"
        new.type, new.shape = old.type, old.shape
        self.nodes.outputs[self.nodes.outputs.index(old)] = new


def broken(path: Path, inject: Callable[[Graph], None]) -> None:
    """Inject a fault into the graph at `path`; a fault in weights alone leaves the graph's file unchanged."""
    graph = Graph(path)
    before = ir.to_proto(graph.model)
    inject(graph)
    for array in graph.weights.values():
        array.flush()
    after = ir.to_proto(graph.model)
    if after != before:
        # An exporter would declare the types and shapes of its new values too.
        path.write_bytes(onnx.shape_inference.infer_shapes(after).SerializeToString())


def named(body: ir.Function | ir.Graph, op_type: str) -> ir.Node:
    """The first node of this type in an op's body, its subgraphs included."""
    return next(node for node in body.all_nodes() if node.op_type == op_type)


def replaced(old: ir.Value, op_type: str, *inputs: ir.Value, **attributes: Any) -> None:
    """In an op's body, replace a value by the result of a new node."""
    producer = old.producer()
    made = ir.node(op_type, inputs, attributes, name=f"wrong.{old.name}")
    made.outputs[0].name = f"wrong.{old.name}"
    producer.graph.insert_after(producer, made)
    for use in old.uses():
        if use.node is not made:
            use.node.replace_input_with(use.idx, made.outputs[0])


@dataclass(frozen=True)
class Fault:
    """An exporter's fault, and the part of the model that it breaks."""

    name: str
    kind: str
    """The kind of the broken layer, which is the first of its kind; or `embeddings` or `head`."""
    inject: Callable[[Graph], None]

    def place(self, layers: dict[int, str]) -> str:
        """The name of the broken part, from the kinds of the model's layers."""
        if self.kind in (EMBEDDINGS, HEAD):
            return self.kind
        return f"layers.{next(index for index, kind in layers.items() if kind == self.kind)}"
