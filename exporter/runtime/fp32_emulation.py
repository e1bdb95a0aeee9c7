"""The FP32 twin of a graph in BF16 or FP16, for ONNX Runtime's CPU provider.

That provider computes nothing in BF16. FP16 it takes, but computes in FP32 and drops the roundings between
operators (1.32: Mul, Add, Gemm, Add became Cast, Mul, Add, Gemm, Add, Cast), so that neither FP16's error
nor its overflow would show. Below, *half* is either type.

What the twin promises: every value that is half in the original is, in the twin, an FP32 value that the half
type can represent. An operator computes in FP32 and its result is rounded once (Cast there and back), which
is how a half operator with an FP32 accumulator rounds. Operators that only move elements, and those whose
result is one of their operands (Max, Relu), make representable values of representable ones and need no
rounding.

Pools follow from this: rows of `conv_state` and `kv_cache` are copies (Gather, Where, ScatterND) of values
that were rounded where they were computed, so the twin's FP32 pools hold the values of the half pools, with
no cast around them.

FP8 (E4M3) is a half type here too, which that provider only casts, quantizes and dequantizes. What a QuantizeLinear
makes stays FP8; what a DequantizeLinear makes is not rounded: TensorRT makes it, the product and its scales one
operator. Other weights in FP8 are cast to FP16, which holds their values, as a whole.

Weights stay half and lie where they lie. One that is gathered (embeddings) or handed over by a Scan (experts)
stays half in memory, and what was taken from it is cast; any other is cast whole, which ONNX Runtime folds
when it loads the graph.
"""

from __future__ import annotations

from collections import ChainMap
from collections.abc import Iterator
from typing import TYPE_CHECKING

import numpy as np

from nemotrt.exporter.errors import BundleError

if TYPE_CHECKING:
    from onnx import AttributeProto, GraphProto, ModelProto, NodeProto

FLOAT, FLOAT16, BFLOAT16, FP8 = 1, 10, 16, 17
"""onnx.TensorProto's numbers for the types: see onnx.proto."""

HALVES = frozenset((FLOAT16, BFLOAT16, FP8))

STORED = frozenset(
    ("Concat", "Gather", "Identity", "Reshape", "Slice", "Split", "Squeeze", "Transpose", "Unsqueeze")
)
"""Operators that ONNX Runtime's CPU provider runs on both half types (tried with 1.32; Expand is not one)."""

EXACT = STORED.union(
    ("Abs", "Expand", "Flatten", "GatherElements", "GatherND", "Max", "Min", "Neg", "Pad", "Relu"),
    ("ScatterElements", "ScatterND", "Tile", "TopK", "Trilu", "Where"),
)
"""Operators whose results are half values when their operands are: they need no rounding."""


def needs_twin(model: ModelProto) -> bool:
    """Whether any input, weight or operator of the model, its subgraphs or its functions is half."""
    graphs = [model.graph, *(graph for node in _nodes(model) for graph in _subgraphs(node))]
    declared = [
        value.type.tensor_type.elem_type
        for graph in graphs
        for value in (*graph.input, *graph.output, *graph.value_info)
    ]
    stored = [tensor.data_type for graph in graphs for tensor in graph.initializer]
    return not HALVES.isdisjoint(declared + stored) or any(_makes_half(node) for node in _nodes(model))


def fp32_twin(model: ModelProto) -> ModelProto:
    """A model with FP32 inputs, outputs and arithmetic that rounds wherever the original does.

    Model-local functions are inlined, so that their inner roundings are kept too. External data stays
    referenced. Raises BundleError when the original is not a valid graph.
    """
    from onnx import inliner, shape_inference

    try:
        flat = inliner.inline_local_functions(model)
        typed = shape_inference.infer_shapes(flat, strict_mode=True)
    except (shape_inference.InferenceError, RuntimeError) as error:
        raise BundleError(f"the graph's types cannot be inferred: {str(error).splitlines()[0]}") from error
    _Rewriter().graph(typed.graph, ChainMap(), ChainMap())
    return typed


def _nodes(model: ModelProto) -> Iterator[NodeProto]:
    """Every node, of functions and subgraphs too."""
    waiting = [*model.graph.node, *(node for function in model.functions for node in function.node)]
    while waiting:
        node = waiting.pop()
        yield node
        waiting += [inner for graph in _subgraphs(node) for inner in graph.node]


def _subgraphs(node: NodeProto) -> list[GraphProto]:
    return [attribute.g for attribute in node.attribute if attribute.HasField("g")]


def _makes_half(node: NodeProto) -> bool:
    return any(
        _casts_to_half(node, attribute) or _is_half_constant(attribute) for attribute in node.attribute
    )


def _casts_to_half(node: NodeProto, attribute: AttributeProto) -> bool:
    return node.op_type == "Cast" and attribute.name == "to" and attribute.i in HALVES


def _is_half_constant(attribute: AttributeProto) -> bool:
    return attribute.HasField("t") and attribute.t.data_type in HALVES


class _Rewriter:
    """Rewrites graphs in place, outermost first; names are looked up through the scopes around a graph."""

    def __init__(self) -> None:
        self._num_names = 0
        self._weights: set[str] = set()

    def graph(
        self,
        graph: GraphProto,
        dtypes: ChainMap[str, int],
        widened: ChainMap[str, str],
        kept: frozenset[str] = frozenset(),
    ) -> None:
        """Rewrite one graph; `dtypes` are the original's, of this graph and those around it.

        `widened` maps each half name to the FP32 name of its value. A name that it lacks still is half in the
        twin: a weight, or what was gathered from one. Inputs named in `kept` are such.
        """
        outputs = frozenset(value.name for value in graph.output)
        self._weights |= {tensor.name for tensor in graph.initializer}
        scope = _Scope(self, outputs, self._weights, dtypes.new_child(), widened.new_child())
        for value in (*graph.input, *graph.output, *graph.value_info):
            scope.dtypes[value.name] = value.type.tensor_type.elem_type
        for tensor in graph.initializer:
            scope.dtypes[tensor.name] = tensor.data_type
        stored = {tensor.name for tensor in graph.initializer}
        for value in graph.input:
            if value.name in kept and scope.dtypes[value.name] == FP8:
                value.type.tensor_type.elem_type = FLOAT16
            elif scope.is_half(value.name) and value.name not in stored and value.name not in kept:
                value.type.tensor_type.elem_type = FLOAT
                scope.widened[value.name] = value.name
        for node in graph.node:
            scope.rewrite(node)
        for value in graph.output:
            if scope.is_half(value.name):
                value.type.tensor_type.elem_type = FLOAT
        del graph.node[:], graph.value_info[:]
        graph.node.extend(scope.nodes)

    def fresh(self, name: str, what: str) -> str:
        """A name that no value of the model has."""
        self._num_names += 1
        return f"{name}.{what}.{self._num_names}"


class _Scope:
    """The nodes of one graph, rewritten one by one, in order."""

    def __init__(
        self,
        rewriter: _Rewriter,
        outputs: frozenset[str],
        weights: set[str],
        dtypes: ChainMap[str, int],
        widened: ChainMap[str, str],
    ) -> None:
        self.weights = weights
        self.dtypes = dtypes
        self.widened = widened
        self.nodes: list[NodeProto] = []
        self._rewriter = rewriter
        self._outputs = outputs

    def is_half(self, name: str) -> bool:
        return self.dtypes.get(name) in HALVES

    def rewrite(self, node: NodeProto) -> None:
        """Append what stands for the node in the twin."""
        kept = self._kept_inputs(node)
        for graph in _subgraphs(node):
            inside = frozenset(graph.input[i].name for i in kept)
            self._rewriter.graph(graph, self.dtypes, self.widened, inside)
        operands = [name for name in node.input if self.is_half(name)]
        results = [name for name in node.output if self.is_half(name)]
        if not operands and not results:
            self.nodes.append(node)
        elif node.op_type in ("Cast", "CastLike"):
            self._cast(node)
        elif node.op_type in ("QuantizeLinear", "DequantizeLinear"):
            self._scale(node)
        elif self._stays_half(node, operands):
            for i, name in enumerate(node.input):
                if self.dtypes.get(name) == FP8:
                    node.input[i] = self._as_half(name)
            self.nodes.append(node)
            self._widen_outputs(node)
        else:
            self._compute(node, results, kept)

    def _kept_inputs(self, node: NodeProto) -> tuple[int, ...]:
        """Which inputs of a Scan are weights that still are half: it hands their rows over where they lie."""
        if node.op_type != "Scan":
            return ()
        count = next(attribute.i for attribute in node.attribute if attribute.name == "num_scan_inputs")
        scanned = range(len(node.input) - count, len(node.input))
        return tuple(i for i in scanned if self.is_half(node.input[i]) and node.input[i] not in self.widened)

    def _stays_half(self, node: NodeProto, operands: list[str]) -> bool:
        """Whether the node only moves weights that still are half."""
        is_weights = bool(operands) and not any(name in self.widened for name in operands)
        return node.op_type in STORED and is_weights

    def _widen_outputs(self, node: NodeProto) -> None:
        """Under the name of an output of the graph, which is FP32, what the node made of half weights."""
        for i, name in enumerate(node.output):
            if name in self._outputs:
                node.output[i] = self._rewriter.fresh(name, "half")
                self._append_cast(node.output[i], name, FLOAT, like=node)
                self.widened[name] = name

    def wide(self, name: str) -> str:
        """The FP32 name of a half value, cast here when no graph around has done it."""
        if name not in self.widened:
            self.widened[name] = self._rewriter.fresh(name, "fp32")
            self._append_cast(name, self.widened[name], FLOAT)
        return self.widened[name]

    def _as_half(self, name: str) -> str:
        """An FP8 weight in FP16, or what was gathered from one and is so already."""
        if name not in self.weights:
            return name
        half = self._rewriter.fresh(name, "fp16")
        self._append_cast(name, half, FLOAT16)
        return half

    def _scale(self, node: NodeProto) -> None:
        """Quantize from FP32, or dequantize to FP32, with a scale in FP32."""
        for i, name in enumerate(node.input):
            if self.is_half(name) and self.dtypes[name] != FP8:
                node.input[i] = self.wide(name)
        if node.op_type == "DequantizeLinear":
            kept = [attribute for attribute in node.attribute if attribute.name != "output_dtype"]
            del node.attribute[:]
            node.attribute.extend(kept)
            self.widened[node.output[0]] = node.output[0]
        self.nodes.append(node)

    def _cast(self, node: NodeProto) -> None:
        source, result = node.input[0], node.output[0]
        source = self.widened.get(source, source)
        if not self.is_half(result):
            self._append_cast(source, result, self.dtypes[result], like=node)
        elif self.dtypes.get(node.input[0]) == self.dtypes[result]:
            self._append_cast(source, result, FLOAT, like=node)
            self.widened[result] = result
        else:
            self._round(source, result, node)

    def _compute(self, node: NodeProto, results: list[str], kept: tuple[int, ...]) -> None:
        for i, name in enumerate(node.input):
            if i in kept and self.dtypes[name] == FP8:
                node.input[i] = self._as_half(name)
            elif self.is_half(name) and i not in kept:
                node.input[i] = self.wide(name)
        for attribute in node.attribute:
            if _is_half_constant(attribute):
                _widen_constant(attribute)
        self.nodes.append(node)
        is_exact = _is_exact(node)
        for i, name in enumerate(node.output):
            if name in results and not is_exact:
                node.output[i] = self._rewriter.fresh(name, "exact")
                self._round(node.output[i], name, node)
            elif name in results:
                self.widened[name] = name

    def _round(self, source: str, result: str, like: NodeProto) -> None:
        """Cast to the original's type and back, under the original's name."""
        rounded = self._rewriter.fresh(result, "rounded")
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
    """Whether a node's results are half values when its operands are; branches and bodies round inside."""
    if node.op_type in ("Constant", "ConstantOfShape") or _subgraphs(node):
        return True
    reduces = any(
        attribute.name == "reduction" and attribute.s not in (b"", b"none") for attribute in node.attribute
    )
    return node.op_type in EXACT and not reduces


def _widen_constant(attribute: AttributeProto) -> None:
    from onnx import numpy_helper

    values = numpy_helper.to_array(attribute.t).astype(np.float32)
    attribute.t.CopyFrom(numpy_helper.from_array(values, attribute.t.name))
