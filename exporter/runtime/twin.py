"""The FP32 twin of a BF16 graph, for ONNX Runtime's CPU provider, which stores BF16 but has no arithmetic on it.

What the twin promises: every value that is BF16 in the original is, in the twin, an FP32 value that BF16 can
represent. An operator computes in FP32 and its result is rounded once to BF16 (Cast there and back), which is how a
BF16 operator with an FP32 accumulator rounds. Operators that only move elements, and those whose result is one of
their operands (Max, Relu), give representable values from representable ones and need no rounding.

Pools follow from this: `conv_state` and `kv_cache` rows are copies (Gather, Where, ScatterND) of values that were
rounded where they were computed, so the twin's FP32 pools hold what the BF16 pools would, with no cast around them.

Weights stay BF16 and lie where they lie. One that is only gathered (embeddings, experts) stays BF16 in memory, and
what was gathered is cast; any other is cast whole, which ONNX Runtime folds when it loads the graph.
"""

from __future__ import annotations

from collections import ChainMap
from collections.abc import Iterator
from typing import TYPE_CHECKING

import numpy as np

from nemotrt.exporter.errors import BundleError

if TYPE_CHECKING:
    from onnx import AttributeProto, GraphProto, ModelProto, NodeProto

BFLOAT16, FLOAT = 16, 1
"""onnx.TensorProto's numbers for the two types: see onnx.proto."""

STORED = frozenset(
    ("Concat", "Gather", "Identity", "Reshape", "Slice", "Split", "Squeeze", "Transpose", "Unsqueeze")
)
"""Operators that ONNX Runtime's CPU provider runs on BF16 (tried with 1.32; Expand is not one)."""

EXACT = STORED | frozenset(
    ("Abs", "Expand", "Flatten", "GatherElements", "GatherND", "Max", "Min", "Neg", "Pad", "Relu")
    + ("ScatterElements", "ScatterND", "Tile", "TopK", "Trilu", "Where")
)
"""Operators whose results are BF16 values when their operands are: they need no rounding."""


def needs_twin(model: ModelProto) -> bool:
    """Whether any input, weight or operator of the model, its subgraphs or its functions is BF16."""
    graphs = [model.graph, *(graph for node in _nodes(model) for graph in _subgraphs(node))]
    declared = [
        value.type.tensor_type.elem_type
        for graph in graphs
        for value in (*graph.input, *graph.output, *graph.value_info)
    ]
    stored = [tensor.data_type for graph in graphs for tensor in graph.initializer]
    return BFLOAT16 in declared or BFLOAT16 in stored or any(_makes_bf16(node) for node in _nodes(model))


def bf16_twin(model: ModelProto) -> ModelProto:
    """A model with FP32 inputs, outputs and arithmetic that rounds wherever the original does.

    Model-local functions are inlined, so that their inner roundings are kept too. External data stays referenced.
    Raises BundleError when the original is not a valid graph.
    """
    import onnx

    try:
        flat = onnx.inliner.inline_local_functions(model)
        typed = onnx.shape_inference.infer_shapes(flat, strict_mode=True)
    except (onnx.shape_inference.InferenceError, RuntimeError) as error:
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


def _makes_bf16(node: NodeProto) -> bool:
    return any(_cast_to_bf16(node, attribute) or _is_bf16_constant(attribute) for attribute in node.attribute)


def _cast_to_bf16(node: NodeProto, attribute: AttributeProto) -> bool:
    return node.op_type == "Cast" and attribute.name == "to" and attribute.i == BFLOAT16


def _is_bf16_constant(attribute: AttributeProto) -> bool:
    return attribute.HasField("t") and attribute.t.data_type == BFLOAT16


class _Rewriter:
    """Rewrites graphs in place, outermost first; names are looked up through the scopes around a graph."""

    def __init__(self) -> None:
        self._num_names = 0

    def graph(self, graph: GraphProto, dtypes: ChainMap[str, int], widened: ChainMap[str, str]) -> None:
        """Rewrite one graph: `dtypes` are the original's; `widened` maps each BF16 name to the FP32 name of its value.

        A BF16 name that `widened` lacks still is BF16 in the twin: a weight, or what was gathered from one.
        """
        scope = _Scope(self, dtypes.new_child(), widened.new_child())
        for value in (*graph.input, *graph.output, *graph.value_info):
            scope.dtypes[value.name] = value.type.tensor_type.elem_type
        for tensor in graph.initializer:
            scope.dtypes[tensor.name] = tensor.data_type
        stored = {tensor.name for tensor in graph.initializer}
        for value in graph.input:
            if scope.is_bf16(value.name) and value.name not in stored:
                value.type.tensor_type.elem_type = FLOAT
                scope.widened[value.name] = value.name
        for node in graph.node:
            scope.rewrite(node)
        for value in graph.output:
            if scope.is_bf16(value.name):
                value.type.tensor_type.elem_type = FLOAT
                if value.name not in scope.widened:
                    value.name = scope.wide(value.name)
        del graph.node[:], graph.value_info[:]
        graph.node.extend(scope.nodes)

    def fresh(self, name: str, what: str) -> str:
        """A name that no value of the model has."""
        self._num_names += 1
        return f"{name}.{what}.{self._num_names}"


class _Scope:
    """The nodes of one graph, rewritten one by one, in order."""

    def __init__(self, rewriter: _Rewriter, dtypes: ChainMap[str, int], widened: ChainMap[str, str]) -> None:
        self.dtypes = dtypes
        self.widened = widened
        self.nodes: list[NodeProto] = []
        self._rewriter = rewriter

    def is_bf16(self, name: str) -> bool:
        return self.dtypes.get(name) == BFLOAT16

    def rewrite(self, node: NodeProto) -> None:
        """Append what stands for the node in the twin."""
        for graph in _subgraphs(node):
            self._rewriter.graph(graph, self.dtypes, self.widened)
        operands = [name for name in node.input if self.is_bf16(name)]
        results = [name for name in node.output if self.is_bf16(name)]
        if not operands and not results:
            self.nodes.append(node)
        elif node.op_type in ("Cast", "CastLike"):
            self._cast(node)
        elif node.op_type in STORED and operands and not any(name in self.widened for name in operands):
            self.nodes.append(node)
        else:
            self._compute(node, results)

    def wide(self, name: str) -> str:
        """The FP32 name of a BF16 value, cast here when no graph around has done it."""
        if name not in self.widened:
            self.widened[name] = self._rewriter.fresh(name, "fp32")
            self._append_cast(name, self.widened[name], FLOAT)
        return self.widened[name]

    def _cast(self, node: NodeProto) -> None:
        source, result = node.input[0], node.output[0]
        source = self.widened.get(source, source)
        if not self.is_bf16(result):
            self._append_cast(source, result, self.dtypes[result], like=node)
        elif self.is_bf16(node.input[0]):
            self._append_cast(source, result, FLOAT, like=node)
            self.widened[result] = result
        else:
            self._round(source, result, node)

    def _compute(self, node: NodeProto, results: list[str]) -> None:
        for i, name in enumerate(node.input):
            if self.is_bf16(name):
                node.input[i] = self.wide(name)
        for attribute in node.attribute:
            if _is_bf16_constant(attribute):
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
        """Cast to BF16 and back, under the original's name."""
        rounded = self._rewriter.fresh(result, "bf16")
        self._append_cast(source, rounded, BFLOAT16, like=like)
        self._append_cast(rounded, result, FLOAT, like=like)
        self.widened[result] = result

    def _append_cast(self, source: str, result: str, dtype: int, *, like: NodeProto | None = None) -> None:
        from onnx import helper

        cast = helper.make_node("Cast", [source], [result], to=dtype)
        if like is not None:
            cast.name = f"{like.name}.{result}"
        self.nodes.append(cast)


def _is_exact(node: NodeProto) -> bool:
    """Whether a node's results are BF16 values when its operands are; branches and bodies round inside."""
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
