"""Writes each op as one ONNX node in domain `nemo`, and as a function that defines it in standard operators.

ONNX Runtime runs the function; TensorRT runs the plugin in the node's `plugin_namespace`.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import onnx_ir as ir

from nemotrt.plugins.spec import DOMAIN, VERSION, OpSpec

OPSET = 23
"""The ONNX opset of graphs and bodies: the first with RMSNormalization. TensorRT supports 21 to 27."""

Operand = ir.Value | int | float | bool | Sequence[int] | np.ndarray[Any, Any]
"""An operand: a value, or a Python number, list or array that becomes a constant."""


def as_array(operand: Any) -> np.ndarray[Any, Any]:
    """A number, list or array as an array: int64 for integers, float32 for floats."""
    array = np.asarray(operand)
    return array.astype(np.float32) if array.dtype.kind == "f" else array


class Operators:
    """Writes nodes by operator name: `op.Add(a, 1.0)` returns a value, `op.TopK(x, k, outputs=2)` returns two."""

    def __init__(self, *, prefix: str = "") -> None:
        self.nodes: list[ir.Node] = []
        self._prefix = prefix
        self._constants: dict[tuple[Any, ...], ir.Value] = {}

    def __getattr__(self, op_type: str) -> Callable[..., Any]:
        if not op_type[0].isupper():
            raise AttributeError(op_type)

        def write(*operands: Operand | None, outputs: int = 1, **attributes: Any) -> Any:
            inputs = [None if operand is None else self.value(operand) for operand in operands]
            node = ir.node(op_type, inputs, attributes, num_outputs=outputs)
            self.add(node)
            return node.outputs[0] if outputs == 1 else tuple(node.outputs)

        return write

    def add(self, node: ir.Node) -> None:
        """Append a node; names are deterministic, so that the same calls give the same bytes."""
        for output in node.outputs:
            if output.name is None:
                output.name = f"{self._prefix}{node.op_type}_{len(self.nodes)}_{output.index()}"
        node.name = node.name or f"{self._prefix}{node.op_type}_{len(self.nodes)}"
        self.nodes.append(node)

    def value(self, operand: Operand) -> ir.Value:
        """The operand itself, or a constant: int64 for integers, float32 for floats."""
        return operand if isinstance(operand, ir.Value) else self.constant(operand)

    def constant(self, operand: Operand) -> ir.Value:
        """The value of a Constant node; equal constants share one node."""
        array = as_array(operand)
        key = (array.dtype.str, array.shape, array.tobytes())
        if key not in self._constants:
            node = ir.node("Constant", [], {"value": ir.tensor(array)})
            self.add(node)
            self._constants[key] = node.outputs[0]
        return self._constants[key]

    def cast(self, operand: Operand, dtype: ir.DataType) -> ir.Value:
        """The operand, cast to `dtype`."""
        return self.Cast(operand, to=dtype)  # type: ignore[no-any-return]

    def subgraph(
        self, name: str, body: Callable[..., Sequence[ir.Value]], inputs: Iterable[ir.Value] = ()
    ) -> ir.Graph:
        """A graph for Scan or If, written by `body(op, *inputs)`, which may use values of the outer graph."""
        inner = Operators(prefix=f"{self._prefix}{name}_")
        inputs = list(inputs)
        outputs: list[ir.Value] = []
        for value in body(inner, *inputs):
            # Outputs must be distinct and come from the subgraph itself. Identity copies, so avoid it if possible.
            is_valid = value.producer() in inner.nodes and value not in outputs
            outputs.append(value if is_valid else inner.Identity(value))
        return ir.Graph(inputs, outputs, nodes=inner.nodes, name=f"{self._prefix}{name}")

    def input(self, name: str) -> ir.Value:
        """An input of a subgraph; its type follows from the value that is passed."""
        return ir.val(f"{self._prefix}{name}")


def function(spec: OpSpec, sizes: Mapping[str, Any], attributes: Mapping[str, int | float]) -> ir.Function:
    """The op as a model-local function, specialized for one model's static sizes and attributes.

    `sizes` maps the SPEC's axes to integers if the model fixes them. The node has the attributes too, for the plugin.
    """
    op = Operators()
    inputs = {tensor.name: ir.val(tensor.name) for tensor in spec.inputs}
    outputs = spec.onnx_body()(op, inputs, sizes, attributes)
    for tensor, value in zip(spec.outputs, outputs, strict=True):
        value.name = tensor.name
    graph = ir.Graph(
        list(inputs.values()), list(outputs), nodes=op.nodes, opset_imports={"": OPSET}, name=spec.name
    )
    return ir.Function(DOMAIN, spec.name, graph=graph, attributes=_attributes(spec, attributes))


def node(
    spec: OpSpec,
    inputs: Sequence[ir.Value],
    outputs: Sequence[ir.Value],
    attributes: Mapping[str, int | float],
    name: str,
) -> ir.Node:
    """The node of one call of the op; raises KeyError if an attribute of the SPEC is missing."""
    return ir.Node(DOMAIN, spec.name, inputs, _attributes(spec, attributes), outputs=outputs, name=name)


def operand(spec: OpSpec, node: ir.Node, name: str) -> ir.Value:
    """The value of a node's input, by its name in the SPEC."""
    value = node.inputs[spec.input_index(name)]
    assert value is not None, "an op has no optional inputs"
    return value


def _attributes(spec: OpSpec, values: Mapping[str, int | float]) -> list[ir.Attr]:
    return [
        ir.AttrInt64(name, int(values[name])) if kind is int else ir.AttrFloat32(name, float(values[name]))
        for name, kind in spec.attributes.items()
    ] + [ir.AttrString("plugin_namespace", DOMAIN), ir.AttrString("plugin_version", str(VERSION))]
