"""Translate an exported PyTorch graph to ONNX nodes, with a table entry for each operator.

The table has the operators that the model uses; another one raises LowerError. Precision is explicit in the traced
graph, so every value keeps the dtype that PyTorch recorded.
"""

import operator
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import onnx_ir as ir
import torch
from torch import fx

from nemotrt.exporter.errors import LowerError
from nemotrt.model import fp8  # noqa: F401  registers torch.ops.nemo.fp8_linear
from nemotrt.plugins import onnx_op, torch_op
from nemotrt.plugins.contract import DType
from nemotrt.plugins.spec import DOMAIN, OpSpec, ops

aten = torch.ops.aten


class Constants:
    """The graph's small constants: one initializer for each distinct value."""

    def __init__(self) -> None:
        self.values: dict[tuple[Any, ...], ir.Value] = {}

    def __call__(self, operand: Any) -> ir.Value:
        """The initializer of a number, list or array."""
        array = onnx_op.as_array(operand)
        key = (array.dtype.str, array.shape, array.tobytes())
        if key not in self.values:
            name = f"constant.{len(self.values)}"
            self.values[key] = ir.val(name, const_value=ir.tensor(array, name=name))
        return self.values[key]


class Translator(onnx_op.Operators):
    """Writes the nodes of one traced module under a name prefix.

    `symbols` maps PyTorch's symbolic sizes to the names of the contract's axes.
    """

    def __init__(self, prefix: str, symbols: Mapping[str, str], constants: Constants) -> None:
        super().__init__(prefix=f"{prefix}." if prefix else "")
        self.forms: list[tuple[OpSpec, dict[str, Any], dict[str, Any]]] = []
        """For each node of an op: SPEC, static sizes, attributes."""
        self._symbols = symbols
        self._constant = constants
        self._values: dict[fx.Node, Any] = {}
        self._names: Counter[str] = Counter()

    def constant(self, operand: Any) -> ir.Value:
        """The graph's initializer of a number, list or array."""
        return self._constant(operand)

    def translate(self, graph: fx.Graph, placeholders: Mapping[str, ir.Value]) -> list[ir.Value]:
        """Write every node of the graph and return the values of its outputs."""
        for node in graph.nodes:
            if node.op == "placeholder":
                self._values[node] = placeholders[node.name]
            elif node.op == "output":
                return [self._values[result] for result in node.args[0]]
            elif node.target not in SKIPPED:
                self._values[node] = self._call(node)
        raise LowerError("the traced graph has no output")

    def names(self) -> dict[str, str]:
        """The names of the traced nodes → the names of their values in the ONNX graph."""
        return {
            node.name: str(value.name)
            for node, value in self._values.items()
            if node.op != "placeholder" and isinstance(value, ir.Value)
        }

    def _call(self, node: fx.Node) -> Any:
        spec = OPS.get(node.target)
        if spec is None and node.target not in OPERATORS:
            raise LowerError(
                f"no ONNX form for {node.target} in {self.scope(node)}",
                hint=f"add it to OPERATORS in {__name__.removeprefix('nemotrt.')}",
            )
        if node.kwargs and spec is None:
            raise LowerError(
                f"{self.scope(node)} calls {node.target} with {', '.join(node.kwargs)}, which has no ONNX form"
            )
        arguments: Any = fx.node.map_arg(node.args, self._values.__getitem__)
        before = len(self.nodes)
        result = (
            self._plugin_op(spec, node, arguments) if spec else OPERATORS[node.target](self, node, *arguments)
        )
        self._name(node, before)
        self._describe(node, result)
        return result

    def _plugin_op(self, spec: OpSpec, node: fx.Node, inputs: Sequence[ir.Value]) -> Any:
        outputs = [ir.val(None) for _ in spec.outputs]
        attributes: dict[str, Any] = dict(node.kwargs)
        written = onnx_op.node(spec, inputs, outputs, attributes, f"{self.scope(node)}.{spec.label}")
        self.add(written)
        shapes = [tuple(argument.meta["val"].shape) for argument in node.args]  # type: ignore[union-attr]
        static = {axis: size for axis, size in spec.sizes(shapes).items() if isinstance(size, int)}
        self.forms.append((spec, static, attributes))
        return outputs if len(outputs) > 1 else outputs[0]

    def scope(self, node: fx.Node) -> str:
        """The module that the node belongs to: `layers.7.mixer`."""
        stack = list(node.meta.get("nn_module_stack", {}).values())
        path = stack[-1][0].removeprefix("L['self']").lstrip(".") if stack else ""
        return f"{self._prefix}{path}".strip(".")

    def _name(self, node: fx.Node, before: int) -> None:
        """Name the nodes written for one traced node after its module and operator; a linear, after its module."""
        operator_name = str(node.target).removeprefix("aten.").partition(".")[0]
        base = self.scope(node) if node.target in LINEARS else f"{self.scope(node)}.{operator_name}"
        repeated = self._names[base]
        self._names[base] += 1
        base += f"_{repeated}" if repeated else ""
        kinds: Counter[str] = Counter()
        for written in self.nodes[before:]:
            if written.domain != DOMAIN:
                again = f"_{kinds[written.op_type]}" if kinds[written.op_type] else ""
                kinds[written.op_type] += 1
                written.name = base if written is self.nodes[-1] else f"{base}.{written.op_type}{again}"
            for output in written.outputs:
                output.name = f"{written.name}.{output.index()}" if len(written.outputs) > 1 else written.name

    def _describe(self, node: fx.Node, result: Any) -> None:
        recorded = node.meta["val"]
        pairs = (
            zip(result, recorded, strict=True) if isinstance(recorded, list | tuple) else [(result, recorded)]
        )
        for value, tensor in pairs:
            value.dtype = _onnx_dtype(tensor)
            value.shape = self.shape(tensor.shape)

    def shape(self, sizes: Sequence[Any]) -> ir.Shape:
        """Recorded sizes as an ONNX shape with the contract's names of axes."""
        return ir.Shape(
            [size if isinstance(size, int) else self._symbols.get(str(size), str(size)) for size in sizes]
        )


Write = Callable[..., Any]
"""Writes a traced node: called with the translator, the node and the ONNX values of its arguments."""


def _onnx_dtype(recorded: Any) -> ir.DataType:
    """The ONNX dtype of a recorded tensor."""
    return ir.DataType(DType.from_torch(recorded.dtype).onnx)


def _linear(
    op: Translator, _: fx.Node, x: ir.Value, weight: ir.Value, bias: ir.Value | None = None
) -> ir.Value:
    # Rank 2 throughout, so a linear is one Gemm on the checkpoint's own [out, in] layout.
    return op.Gemm(x, weight, bias, transB=1) if bias is not None else op.Gemm(x, weight, transB=1)  # type: ignore[no-any-return]


def _fp8_linear(
    op: Translator,
    node: fx.Node,
    x: ir.Value,
    weight: ir.Value,
    weight_scale: ir.Value,
    input_scale: ir.Value,
    bias: ir.Value | None,
) -> ir.Value:
    # TensorRT fuses this pattern into one FP8 product: nothing between Q, DQ and Gemm, scales in FP32 as they are
    # stored, and a weight that is stored in FP8 and only dequantized.
    dtype = _onnx_dtype(node.meta["val"])

    def dequantized(values: ir.Value, scale: ir.Value) -> ir.Value:
        axis = {"axis": 0} if scale.shape else {}
        return op.DequantizeLinear(values, scale, output_dtype=dtype, **axis)  # type: ignore[no-any-return]

    rounded = op.QuantizeLinear(x, input_scale, output_dtype=ir.DataType.FLOAT8E4M3FN)
    product = (dequantized(rounded, input_scale), dequantized(weight, weight_scale))
    return op.Gemm(*product, *([] if bias is None else [bias]), transB=1)  # type: ignore[no-any-return]


def _rms_norm(
    op: Translator,
    node: fx.Node,
    x: ir.Value,
    normalized: list[int],
    weight: ir.Value | None = None,
    eps: float = 0.0,
) -> ir.Value:
    dtype = node.meta["val"].dtype
    if dtype != torch.float32:
        raise LowerError(f"{op.scope(node)} normalizes in {dtype}; it must be FP32")
    scale = weight if weight is not None else np.ones(normalized)
    return op.RMSNormalization(x, scale, axis=-len(normalized), epsilon=eps)  # type: ignore[no-any-return]


def _reshape(op: Translator, node: fx.Node, x: ir.Value, *_: Any) -> ir.Value:
    # Only the first axis (tokens, sequences) may be dynamic, and must stay as it is: a size of 0 copies it.
    sizes, before = node.meta["val"].shape, node.args[0].meta["val"].shape  # type: ignore[union-attr]
    is_unchanged = isinstance(sizes[0], int) or str(sizes[0]) == str(before[0])
    if not is_unchanged or not all(isinstance(size, int) for size in sizes[1:]):
        raise LowerError(
            f"{op.scope(node)} reshapes {tuple(before)} to {tuple(sizes)}: only an unchanged first axis may be dynamic"
        )
    return op.Reshape(x, [size if isinstance(size, int) else 0 for size in sizes])  # type: ignore[no-any-return]


def _split(op: Translator, _: fx.Node, x: ir.Value, sizes: list[int], axis: int = 0) -> tuple[ir.Value, ...]:
    return op.Split(x, sizes, axis=axis, outputs=len(sizes))  # type: ignore[no-any-return]


def _cast(op: Translator, node: fx.Node, x: ir.Value, *_: Any) -> ir.Value:
    # PyTorch also records casts to the same dtype.
    dtype = _onnx_dtype(node.meta["val"])
    return x if x.dtype == dtype else op.cast(x, dtype)


def _square(op: Translator, node: fx.Node, x: ir.Value, exponent: int = 2) -> ir.Value:
    if exponent != 2:
        raise LowerError(
            f"{op.scope(node)} raises to the power of {exponent}; only squares have an ONNX form"
        )
    return op.Mul(x, x)  # type: ignore[no-any-return]


LINEARS = {aten.linear.default, torch.ops.nemo.fp8_linear.default}

SKIPPED = {aten._assert_tensor_metadata.default}

OPS: dict[Any, OpSpec] = {torch_op.overload(spec): spec for spec in ops()}

OPERATORS: dict[Any, Write] = {
    operator.getitem: lambda op, node, values, index: values[index],
    aten.add.Tensor: lambda op, node, x, y: op.Add(x, y),
    aten.embedding.default: lambda op, node, weight, ids, *_: op.Gather(weight, ids, axis=0),
    aten.flatten.using_ints: _reshape,
    aten.index_select.default: lambda op, node, x, axis, index: op.Gather(x, index, axis=axis),
    aten.linear.default: _linear,
    aten.matmul.default: lambda op, node, x, y: op.MatMul(x, y),
    aten.mul.Tensor: lambda op, node, x, y: op.Mul(x, y),
    aten.pow.Tensor_Scalar: _square,
    aten.relu.default: lambda op, node, x: op.Relu(x),
    aten.reshape.default: _reshape,
    aten.rms_norm.default: _rms_norm,
    aten.sigmoid.default: lambda op, node, x: op.Sigmoid(x),
    aten.silu.default: lambda op, node, x: op.Mul(x, op.Sigmoid(x)),
    aten.split_with_sizes.default: _split,
    aten.square.default: _square,
    aten.t.default: lambda op, node, x: op.Transpose(x, perm=[1, 0]),
    aten.to.dtype: _cast,
    aten.unflatten.int: _reshape,
    aten.view.default: _reshape,
    torch.ops.nemo.fp8_linear.default: _fp8_linear,
}
