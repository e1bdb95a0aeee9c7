"""The ops as ONNX: one node in domain `nemo` each, and a function that says its meaning in standard operators.

ONNX Runtime runs the function; TensorRT takes the plugin of the node's `plugin_namespace`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import onnx_ir as ir

from nemotrt.plugins.spec import DOMAIN, VERSION, OpSpec

OPSET = 23
"""The ONNX opset of graphs and bodies: the first with RMSNormalization, inside what TensorRT parses (21 to 27)."""

Operand = ir.Value | int | float | bool | Sequence[int] | np.ndarray[Any, Any]
"""What an operator takes: a value, or a Python number, list or array that becomes a constant."""


def as_array(operand: Any) -> np.ndarray[Any, Any]:
    """A number, list or array as ONNX wants it: int64 for integers, float32 for floats."""
    array = np.asarray(operand)
    return array.astype(np.float32) if array.dtype.kind == "f" else array


class Operators:
    """Writes nodes by operator name: `op.Add(a, 1.0)` gives the value; `op.TopK(x, k, outputs=2)` gives two."""

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
        """Append a node, naming its outputs so that the same calls give the same bytes."""
        for output in node.outputs:
            if output.name is None:
                output.name = f"{self._prefix}{node.op_type}_{len(self.nodes)}_{output.index()}"
        node.name = node.name or f"{self._prefix}{node.op_type}_{len(self.nodes)}"
        self.nodes.append(node)

    def value(self, operand: Operand) -> ir.Value:
        """The operand itself, or a constant: int64 for integers, float32 for floats."""
        return operand if isinstance(operand, ir.Value) else self.constant(operand)

    def constant(self, operand: Operand) -> ir.Value:
        """A Constant node's value, one node for each distinct constant."""
        array = as_array(operand)
        key = (array.dtype.str, array.shape, array.tobytes())
        if key not in self._constants:
            node = ir.node("Constant", [], {"value": ir.tensor(array)})
            self.add(node)
            self._constants[key] = node.outputs[0]
        return self._constants[key]

    def cast(self, operand: Operand, dtype: ir.DataType) -> ir.Value:
        """The operand as `dtype`."""
        return self.Cast(operand, to=dtype)  # type: ignore[no-any-return]

    def subgraph(
        self, name: str, body: Callable[..., Sequence[ir.Value]], inputs: Iterable[ir.Value] = ()
    ) -> ir.Graph:
        """A graph for Scan or If: `body(op, *inputs)` writes into it, and may use values from outside."""
        inner = Operators(prefix=f"{self._prefix}{name}_")
        inputs = list(inputs)
        outputs: list[ir.Value] = []
        for value in body(inner, *inputs):
            # An output of a subgraph must be its own node's, and not twice; an Identity copies, so only where needed.
            is_own = value.producer() in inner.nodes and value not in outputs
            outputs.append(value if is_own else inner.Identity(value))
        return ir.Graph(inputs, outputs, nodes=inner.nodes, name=f"{self._prefix}{name}")

    def input(self, name: str) -> ir.Value:
        """An input of a subgraph, which takes its type from what it is bound to."""
        return ir.val(f"{self._prefix}{name}")


def function(spec: OpSpec, sizes: Mapping[str, Any], attributes: Mapping[str, int | float]) -> ir.Function:
    """The op's meaning as a model-local function, for the static sizes and attributes of one model.

    `sizes` maps the SPEC's axes to integers where the model fixes them. Attributes are fixed in the body; the node
    carries them too, for the plugin.
    """
    op = Operators()
    inputs = {tensor.name: ir.val(tensor.name) for tensor in spec.inputs}
    outputs = spec.onnx_body()(op, inputs, sizes, attributes)
    for tensor, value in zip(spec.outputs, outputs, strict=True):
        value.name = tensor.name
    graph = ir.Graph(
        list(inputs.values()), list(outputs), nodes=op.nodes, opset_imports={"": OPSET}, name=spec.name
    )
    declared = [
        ir.Attr(attribute.name, ir.AttributeType.FLOAT, float(attributes[attribute.name]))
        if attribute.type is float
        else ir.Attr(attribute.name, ir.AttributeType.INT, int(attributes[attribute.name]))
        for attribute in spec.attributes
    ]
    plugin = [
        ir.AttrString("plugin_namespace", DOMAIN),
        ir.AttrString("plugin_version", str(VERSION)),
    ]
    return ir.Function(DOMAIN, spec.name, graph=graph, attributes=declared + plugin)


def node(
    spec: OpSpec,
    inputs: Sequence[ir.Value],
    outputs: Sequence[ir.Value],
    attributes: Mapping[str, int | float],
    name: str,
) -> ir.Node:
    """The op's one node; raises KeyError when an attribute of the SPEC is missing."""
    values = {attribute.name: attribute.type(attributes[attribute.name]) for attribute in spec.attributes}
    plugin = {"plugin_namespace": DOMAIN, "plugin_version": str(VERSION)}
    return ir.Node(
        DOMAIN,
        spec.name,
        inputs,
        [ir.AttrInt64(key, v) if isinstance(v, int) else ir.AttrFloat32(key, v) for key, v in values.items()]
        + [ir.AttrString(key, v) for key, v in plugin.items()],
        outputs=outputs,
        name=name,
    )


def operand(spec: OpSpec, node: ir.Node, name: str) -> ir.Value:
    """The value that the op's node takes as the input that the SPEC calls `name`."""
    value = node.inputs[spec.input_index(name)]
    assert value is not None, "an op has no optional inputs"
    return value
