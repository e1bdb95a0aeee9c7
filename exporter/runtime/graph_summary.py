"""The inputs, outputs and pools of an ONNX file, as the manifest describes them."""

from __future__ import annotations

import re
from pathlib import Path
from typing import TYPE_CHECKING

from nemotrt.exporter.runtime.graph_file import read_proto
from nemotrt.exporter.runtime.manifest import GraphSummary, GraphValue
from nemotrt.plugins.contract import NEXT, DType, PoolSpec

if TYPE_CHECKING:
    from onnx import ValueInfoProto

KIND_OF_OP = {
    "NemoSelectiveScan": "mamba",
    "NemoPagedAttention": "attention",
    "NemoMoeDispatch": "moe",
}
"""The op that tells a layer's kind in a graph; a layer with none of them is an MLP."""


PLACE = re.compile(r"(layers\.\d+|embeddings|head)\.")
"""Where a node stands in the model, as its name begins."""


def describe_graph(path: Path) -> GraphSummary:
    """Inputs, outputs and pools of the file, without its weights; raises BundleError if it is not an ONNX file."""
    graph = read_proto(path).graph
    inputs = tuple(_value(value) for value in graph.input)
    outputs = tuple(_value(value) for value in graph.output)
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
