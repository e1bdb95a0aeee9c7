"""The edges of an ONNX file in the manifest's words."""

from __future__ import annotations

import re
from pathlib import Path
from typing import TYPE_CHECKING

from nemotrt.exporter.runtime.graph_file import NEXT, read_proto
from nemotrt.exporter.runtime.manifest import Edge, GraphSummary, PoolPair

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
    """Inputs, outputs and pools of the file, weights not read; raises BundleError when it is no ONNX file."""
    graph = read_proto(path).graph
    inputs = tuple(_edge(value) for value in graph.input)
    outputs = tuple(_edge(value) for value in graph.output)
    replacing = {edge.name for edge in outputs}
    pools = tuple(
        PoolPair(
            input=edge.name,
            output=NEXT + edge.name,
            axis=str(edge.axes[0]),
            dtype=edge.dtype,
            row_shape=tuple(size for size in edge.axes[1:] if isinstance(size, int)),
        )
        for edge in inputs
        if NEXT + edge.name in replacing
    )
    return GraphSummary(inputs, outputs, pools)


def _edge(value: ValueInfoProto) -> Edge:
    from onnx import helper

    tensor = value.type.tensor_type
    dtype = helper.tensor_dtype_to_np_dtype(tensor.elem_type).name
    return Edge(value.name, dtype, tuple(size.dim_param or size.dim_value for size in tensor.shape.dim))
