"""The inputs, outputs and pools of an ONNX file, as the manifest describes them."""

from __future__ import annotations

from typing import TYPE_CHECKING

from nemotrt.exporter.runtime.graph_file import OnnxGraph
from nemotrt.exporter.runtime.manifest import GraphSummary, GraphValue
from nemotrt.plugins.contract import NEXT, DType, PoolSpec

if TYPE_CHECKING:
    from onnx import ValueInfoProto

KIND_OF_OP = {
    "NemoSelectiveScan": "mamba",
    "NemoPagedAttention": "attention",
    "NemoMoeDispatch": "moe",
}
"""An op → the kind of a layer that has it; a layer with none of them is an MLP."""


def describe_graph(graph: OnnxGraph) -> GraphSummary:
    """The graph's inputs, outputs and pools."""
    inputs = tuple(map(_value, graph.proto.graph.input))
    outputs = tuple(map(_value, graph.proto.graph.output))
    output_names = {value.name for value in outputs}
    pools = tuple(
        PoolSpec(
            value.name, DType(value.dtype), tuple(size for size in value.axes[1:] if isinstance(size, int))
        )
        for value in inputs
        if NEXT + value.name in output_names
    )
    return GraphSummary(inputs, outputs, pools)


def _value(value: ValueInfoProto) -> GraphValue:
    from onnx import helper

    tensor = value.type.tensor_type
    dtype = helper.tensor_dtype_to_np_dtype(tensor.elem_type).name
    return GraphValue(value.name, dtype, tuple(size.dim_param or size.dim_value for size in tensor.shape.dim))
