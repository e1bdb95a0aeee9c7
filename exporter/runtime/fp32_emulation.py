"""The FP32 emulation of a graph in BF16, FP16 or FP8, for ONNX Runtime's CPU provider.

That provider does not compute in BF16. It accepts FP16, but computes in FP32 and drops the roundings between
operators (1.32: Mul, Add, Gemm, Add became Cast, Mul, Add, Gemm, Add, Cast), which hides FP16's rounding errors and
overflows. Below, a *narrow* type is BF16, FP16 or FP8.

Every narrow value of the original is an FP32 value in the emulation, and the narrow type can represent it. An
operator computes in FP32, and its result is rounded once by a Cast to the narrow type and back: a kernel of the
narrow type with an FP32 accumulator rounds in the same way. Operators that only move elements, and operators whose
result is one of their operands (Max, Relu), need no rounding: representable operands give representable results.

Pools need no Cast either. Rows of `conv_state` and `kv_cache` are copies (Gather, Where, ScatterND) of values that
were rounded where they were computed, so the FP32 pools hold exactly the values of the narrow pools.

The provider casts, quantizes and dequantizes FP8 (E4M3), and does nothing else with it. The result of a QuantizeLinear
stays FP8. The result of a DequantizeLinear is not rounded, because TensorRT fuses it with the product and the scales.
Other FP8 weights are cast to FP16, which represents all of their values, as a whole.

Weights stay narrow in their files. A weight that is gathered (embeddings) or sliced by a Scan (experts) stays narrow
in memory too, and only the gathered rows or slices are cast. Any other weight is cast as a whole; ONNX Runtime folds
that Cast when it loads the graph.
"""

from __future__ import annotations

from collections import ChainMap
from collections.abc import Iterator
from itertools import count
from typing import TYPE_CHECKING

import numpy as np

from nemotrt.exporter.errors import BundleError
from nemotrt.plugins.contract import DType

if TYPE_CHECKING:
    from onnx import GraphProto, ModelProto, NodeProto

FLOAT, FLOAT16, FP8 = DType.FLOAT32.onnx, DType.FLOAT16.onnx, DType.FLOAT8_E4M3.onnx

NARROW = frozenset((FLOAT16, DType.BFLOAT16.onnx, FP8))

MOVES = frozenset(
    ("Concat", "Gather", "Identity", "Reshape", "Slice", "Split", "Squeeze", "Transpose", "Unsqueeze")
)
"""Operators that move elements and that ONNX Runtime's CPU provider runs in BF16 and FP16 (1.32; not Expand)."""

EXACT = MOVES.union(
    ("Abs", "Expand", "Flatten", "GatherElements", "GatherND", "Max", "Min", "Neg", "Pad", "Relu"),
    ("ScatterElements", "ScatterND", "Tile", "TopK", "Trilu", "Where"),
)
"""Operators whose results are representable if their operands are: they need no rounding."""


def needs_emulation(model: ModelProto) -> bool:
    """Whether the model, its subgraphs or its functions have any narrow value."""
    return any(number in NARROW for number in _dtypes(model))


def _dtypes(model: ModelProto) -> Iterator[int]:
    """The dtypes of the declared values, weights, constants and casts of the model, its subgraphs and functions."""
    graphs = [model.graph]
    nodes = [node for function in model.functions for node in function.node]
    while graphs or nodes:
        for graph in graphs:
            for value in (*graph.input, *graph.output, *graph.value_info):
                yield value.type.tensor_type.elem_type
            yield from (tensor.data_type for tensor in graph.initializer)
            nodes += graph.node
        for node in nodes:
            for attribute in node.attribute:
                if attribute.HasField("t"):
                    yield attribute.t.data_type
                elif node.op_type == "Cast" and attribute.name == "to":
                    yield attribute.i
        graphs, nodes = [graph for node in nodes for graph in _subgraphs(node)], []


def emulate_in_fp32(model: ModelProto) -> ModelProto:
    """A copy of the model that computes in FP32 and rounds wherever the original does.

    Its inputs and outputs are FP32. Functions are inlined, so that values inside them are rounded too. Weights stay
    references to their files. Raises BundleError if the original is not a valid graph.
    """
    from onnx import inliner, shape_inference

    try:
        flat = inliner.inline_local_functions(model)
        typed = shape_inference.infer_shapes(flat, strict_mode=True)
    except (shape_inference.InferenceError, RuntimeError) as error:
        raise BundleError(f"the graph's types cannot be inferred: {str(error).splitlines()[0]}") from error
    _Scope(typed.graph).rewrite()
    return typed


def _subgraphs(node: NodeProto) -> list[GraphProto]:
    return [attribute.g for attribute in node.attribute if attribute.HasField("g")]


class _Scope:
    """Rewrites one graph in place; a subgraph sees the names of the graphs around it.

    `dtypes` holds the original dtypes. `widened` maps the name of a narrow value to the name of its FP32 value. A
    narrow name without an entry is still narrow in the emulation: a weight, rows gathered from one, or one of
    `narrow_inputs`.
    """

    def __init__(
        self, graph: GraphProto, parent: _Scope | None = None, narrow_inputs: frozenset[str] = frozenset()
    ) -> None:
        self.dtypes: ChainMap[str, int] = parent.dtypes.new_child() if parent else ChainMap()
        self.widened: ChainMap[str, str] = parent.widened.new_child() if parent else ChainMap()
        self.weights: set[str] = parent.weights if parent else set()
        self.numbers: Iterator[int] = parent.numbers if parent else count(1)
        self.nodes: list[NodeProto] = []
        self._graph, self._narrow_names = graph, narrow_inputs
        self._outputs = frozenset(value.name for value in graph.output)

    def rewrite(self) -> None:
        """Rewrite the graph."""
        graph, stored = self._graph, {tensor.name: tensor.data_type for tensor in self._graph.initializer}
        self.weights |= stored.keys()
        for value in (*graph.input, *graph.output, *graph.value_info):
            self.dtypes[value.name] = value.type.tensor_type.elem_type
        self.dtypes |= stored
        for value in graph.input:
            if value.name in self._narrow_names and self.dtypes[value.name] == FP8:
                value.type.tensor_type.elem_type = FLOAT16
            elif self.is_narrow(value.name) and value.name not in stored.keys() | self._narrow_names:
                value.type.tensor_type.elem_type = FLOAT
                self.widened[value.name] = value.name
        for node in graph.node:
            self._rewrite_node(node)
        for value in graph.output:
            if self.is_narrow(value.name):
                value.type.tensor_type.elem_type = FLOAT
        del graph.node[:], graph.value_info[:]
        graph.node.extend(self.nodes)

    def _unique(self, name: str, suffix: str) -> str:
        """A name that no value of the model has."""
        return f"{name}.{suffix}.{next(self.numbers)}"

    def is_narrow(self, name: str) -> bool:
        return self.dtypes.get(name) in NARROW

    def _rewrite_node(self, node: NodeProto) -> None:
        """Append the nodes that emulate this one."""
        narrow_inputs = self._narrow_inputs(node)
        for graph in _subgraphs(node):
            names = frozenset(graph.input[i].name for i in narrow_inputs)
            _Scope(graph, self, names).rewrite()
        operands = [name for name in node.input if self.is_narrow(name)]
        results = [name for name in node.output if self.is_narrow(name)]
        if not operands and not results:
            self.nodes.append(node)
        elif node.op_type in ("Cast", "CastLike"):
            self._cast(node)
        elif node.op_type in ("QuantizeLinear", "DequantizeLinear"):
            self._scale(node)
        elif operands and node.op_type in MOVES and self.widened.keys().isdisjoint(operands):
            # The node only moves elements of narrow weights, and its results stay narrow.
            for i, name in enumerate(node.input):
                if self.dtypes.get(name) == FP8:
                    node.input[i] = self._as_fp16(name)
            self.nodes.append(node)
            self._widen_outputs(node)
        else:
            self._compute(node, results, narrow_inputs)

    def _narrow_inputs(self, node: NodeProto) -> tuple[int, ...]:
        """Which inputs of a Scan are narrow weights: it slices them without a copy."""
        if node.op_type != "Scan":
            return ()
        size = next(attribute.i for attribute in node.attribute if attribute.name == "num_scan_inputs")
        scanned = range(len(node.input) - size, len(node.input))
        return tuple(
            i for i in scanned if self.is_narrow(node.input[i]) and node.input[i] not in self.widened
        )

    def _widen_outputs(self, node: NodeProto) -> None:
        """Cast the node's narrow results that are outputs of the graph, whose outputs are FP32."""
        for i, name in enumerate(node.output):
            if name in self._outputs:
                node.output[i] = self._unique(name, "narrow")
                self._append_cast(node.output[i], name, FLOAT, like=node)
                self.widened[name] = name

    def wide(self, name: str) -> str:
        """The name of a narrow value in FP32; a Cast is appended unless this graph or one around it has it."""
        if name not in self.widened:
            self.widened[name] = self._unique(name, "fp32")
            self._append_cast(name, self.widened[name], FLOAT)
        return self.widened[name]

    def _as_fp16(self, name: str) -> str:
        """The name of an FP8 weight in FP16; rows that were gathered from one already are FP16."""
        if name not in self.weights:
            return name
        result = self._unique(name, "fp16")
        self._append_cast(name, result, FLOAT16)
        return result

    def _scale(self, node: NodeProto) -> None:
        """Quantize from FP32, or dequantize to FP32, with an FP32 scale."""
        for i, name in enumerate(node.input):
            if self.is_narrow(name) and self.dtypes[name] != FP8:
                node.input[i] = self.wide(name)
        if node.op_type == "DequantizeLinear":
            for attribute in [field for field in node.attribute if field.name == "output_dtype"]:
                node.attribute.remove(attribute)
            self.widened[node.output[0]] = node.output[0]
        self.nodes.append(node)

    def _cast(self, node: NodeProto) -> None:
        source, result = node.input[0], node.output[0]
        source = self.widened.get(source, source)
        if not self.is_narrow(result):
            self._append_cast(source, result, self.dtypes[result], like=node)
        elif self.dtypes.get(node.input[0]) == self.dtypes[result]:
            self._append_cast(source, result, FLOAT, like=node)
            self.widened[result] = result
        else:
            self._round(source, result, node)

    def _compute(self, node: NodeProto, results: list[str], narrow_inputs: tuple[int, ...]) -> None:
        from onnx import numpy_helper

        for i, name in enumerate(node.input):
            if i in narrow_inputs and self.dtypes[name] == FP8:
                node.input[i] = self._as_fp16(name)
            elif self.is_narrow(name) and i not in narrow_inputs:
                node.input[i] = self.wide(name)
        for attribute in node.attribute:
            if attribute.HasField("t") and attribute.t.data_type in NARROW:
                values = numpy_helper.to_array(attribute.t).astype(np.float32)
                attribute.t.CopyFrom(numpy_helper.from_array(values, attribute.t.name))
        self.nodes.append(node)
        is_exact = _is_exact(node)
        for i, name in enumerate(node.output):
            if name in results and not is_exact:
                node.output[i] = self._unique(name, "exact")
                self._round(node.output[i], name, node)
            elif name in results:
                self.widened[name] = name

    def _round(self, source: str, result: str, like: NodeProto) -> None:
        """Cast to the original's dtype and back, under the original's name."""
        rounded = self._unique(result, "rounded")
        self._append_cast(source, rounded, self.dtypes[result], like=like)
        self._append_cast(rounded, result, FLOAT, like=like)
        self.widened[result] = result

    def _append_cast(self, source: str, result: str, dtype: int, *, like: NodeProto | None = None) -> None:
        from onnx import helper

        cast = helper.make_node("Cast", [source], [result], to=dtype)
        if like is not None:
            cast.name = f"{like.name}.{result}"
        self.nodes.append(cast)


def _is_exact(node: NodeProto) -> bool:
    """Whether a node needs no rounding; the nodes inside branches and bodies are rounded themselves."""
    if node.op_type in ("Constant", "ConstantOfShape") or _subgraphs(node):
        return True
    reduces = any(
        attribute.name == "reduction" and attribute.s not in (b"", b"none") for attribute in node.attribute
    )
    return node.op_type in EXACT and not reduces
