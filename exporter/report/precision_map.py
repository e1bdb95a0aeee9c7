"""The dtypes of each layer's weights, ops, norms and pools, read from a graph."""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from nemotrt.exporter.runtime.graph_file import KIND_OF_OP, WEIGHT_DTYPES
from nemotrt.plugins.contract import EMBEDDINGS, HEAD, LayerName
from nemotrt.plugins.moe_dispatch import SPEC as MOE
from nemotrt.plugins.spec import DOMAIN

if TYPE_CHECKING:
    import onnx_ir as ir

CONSTANT = "constant."
"""Prefix of the names of constants that several layers may share."""


@dataclass
class PlacePrecision:
    """The dtypes of one layer, of the embeddings or of the head."""

    place: str
    kind: str
    dtypes: dict[str, str] = field(default_factory=dict)
    """A linear layer, an op, a norm or a pool → fp32, fp16, bf16 or fp8; for a linear layer, its weight's dtype."""
    bytes_by_dtype: dict[str, int] = field(default_factory=lambda: defaultdict(int))
    """Bytes of the weights."""

    def add(self, name: str, value: ir.Value) -> None:
        """Record the dtype of `value` under `name`."""
        if dtype := _dtype_name(value):
            self.dtypes[name] = dtype


def precision_map(model: ir.Model) -> list[PlacePrecision]:
    """The dtypes of every part in the order in which tokens pass them; empty if nodes are not named for layers."""
    places: dict[str, PlacePrecision] = {}
    counted: set[ir.Value] = set()
    for node in model.graph:
        layer = LayerName.parse(node.name or "")
        if layer is None:
            continue
        kind = layer.part if layer.part in (EMBEDDINGS, HEAD) else "mlp"
        place = places.setdefault(layer.part, PlacePrecision(layer.part, kind))
        place.kind = KIND_OF_OP.get(node.op_type, place.kind)
        if value := _characteristic_value(node):
            place.add(_label(layer.inner), value)
        for weight in map(_weight, node.inputs):
            if weight and weight.const_value is not None and weight not in counted:
                counted.add(weight)
                if dtype := _dtype_name(weight):
                    place.bytes_by_dtype[dtype] += weight.const_value.nbytes
    for value in model.graph.inputs:
        layer = LayerName.parse(value.name or "")
        if layer and layer.part in places:
            places[layer.part].add(layer.inner, value)
    return list(places.values())


def _dtype_name(value: ir.Value) -> str:
    """fp32, fp16, bf16 or fp8; empty for other dtypes."""
    number = value.dtype if value.const_value is None else value.const_value.dtype
    return next((dtype.label.lower() for dtype in WEIGHT_DTYPES if dtype.onnx == number), "")


def _weight(value: ir.Value | None) -> ir.Value | None:
    """The weight behind an input of a node; an FP8 weight is the input of a DequantizeLinear."""
    producer = value.producer() if value else None
    if producer and producer.op_type == "DequantizeLinear":
        value = producer.inputs[0]
    is_weight = value and value.is_initializer() and not str(value.name).startswith(CONSTANT)
    return value if is_weight else None


def _characteristic_value(node: ir.Node) -> ir.Value | None:
    """The value whose dtype is reported for a node; None for nodes that only move or add values."""
    if node.op_type in ("Gemm", "MatMul"):
        return _weight(node.inputs[1]) or node.inputs[1]
    if node.op_type == MOE.name:
        return node.inputs[MOE.input_index("up")]
    if node.domain == DOMAIN or node.op_type == "RMSNormalization":
        return node.outputs[0]
    return _weight(node.inputs[0]) if node.op_type == "Gather" else None


def _label(inner: str) -> str:
    label = inner.removesuffix(".rms_norm")
    return label if label == "mixer.norm" else label.removeprefix("mixer.")
