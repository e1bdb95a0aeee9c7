"""What each layer of a graph is stored and computed in, as its nodes, weights and pools say."""

from __future__ import annotations

import re
from collections import defaultdict
from dataclasses import dataclass, field
from math import prod
from typing import TYPE_CHECKING

from nemotrt.exporter.runtime.graph_file import PRECISIONS
from nemotrt.exporter.runtime.graph_summary import KIND_OF_OP, PLACE
from nemotrt.plugins.spec import DOMAIN

if TYPE_CHECKING:
    from onnx import GraphProto, ModelProto, NodeProto

LINEAR, NORM, EMBEDDING = ("Gemm", "MatMul"), "RMSNormalization", "Gather"
BYTES = {"fp32": 4, "fp16": 2, "bf16": 2, "fp8": 1}
CONSTANT = "constant."
"""Begins the name of what the translation made and several layers may share."""
POOL = re.compile(r"(conv_state|ssm_state|kv_cache)\.(\d+)")


@dataclass
class PlacePrecision:
    """One layer, the embeddings or the head."""

    place: str
    kind: str = "mlp"
    dtypes: dict[str, str] = field(default_factory=dict)
    """A linear layer, an op, a norm or a pool → fp32, fp16, bf16 or fp8; a linear layer's weight decides."""
    bytes_by_dtype: dict[str, int] = field(default_factory=lambda: defaultdict(int))
    """Of its weights."""


def precision_map(model: ModelProto) -> list[PlacePrecision]:
    """Every place in the order in which tokens pass it; nothing of a graph whose nodes are not named for layers."""
    graph = model.graph
    types = _types(graph)
    stored = {t.name: prod(t.dims) for t in graph.initializer if not t.name.startswith(CONSTANT)}
    # The weight of a linear layer in FP8 comes out of a DequantizeLinear.
    origin = {node.output[0]: node.input[0] for node in graph.node if node.op_type == "DequantizeLinear"}
    found: dict[str, PlacePrecision] = {}
    for node in graph.node:
        match = PLACE.match(node.name)
        if not match:
            continue
        place = found.setdefault(match.group(1), PlacePrecision(match.group(1)))
        if node.op_type in KIND_OF_OP:
            place.kind = KIND_OF_OP[node.op_type]
        if value := _telling(node, stored, origin):
            _note(place, _what(node.name, match.end()), types.get(value, 0))
        for name in node.input:
            weight = origin.get(name, name)
            if weight in stored and types[weight] in PRECISIONS:
                dtype = PRECISIONS[types[weight]]
                place.bytes_by_dtype[dtype] += stored.pop(weight) * BYTES[dtype]
    for name, element in types.items():
        if (pool := POOL.fullmatch(name)) and f"layers.{pool.group(2)}" in found:
            _note(found[f"layers.{pool.group(2)}"], pool.group(1), element)
    for place in found.values():
        place.kind = place.kind if place.place.startswith("layers.") else place.place
    return list(found.values())


def _types(graph: GraphProto) -> dict[str, int]:
    values = (*graph.value_info, *graph.output, *graph.input)
    types = {value.name: value.type.tensor_type.elem_type for value in values}
    return types | {tensor.name: tensor.data_type for tensor in graph.initializer}


def _telling(node: NodeProto, stored: dict[str, int], origin: dict[str, str]) -> str:
    """The value whose type says what a node is in; empty of nodes that only move or add values."""
    telling = ""
    if node.op_type in LINEAR:
        telling = origin.get(node.input[1], node.input[1])
    elif node.op_type == "NemoMoeDispatch":
        telling = node.input[3]
    elif node.domain == DOMAIN or node.op_type == NORM:
        telling = node.output[0]
    elif node.op_type == EMBEDDING and node.input[0] in stored:
        telling = node.input[0]
    return telling


def _what(name: str, start: int) -> str:
    inner = name[start:].removesuffix(".rms_norm")
    return inner if inner == "mixer.norm" else inner.removeprefix("mixer.")


def _note(place: PlacePrecision, what: str, element: int) -> None:
    if element in PRECISIONS:
        place.dtypes[what] = PRECISIONS[element]
