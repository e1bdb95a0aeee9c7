"""Lower: the traced parts as one ONNX graph with one node for each op, and its weights next to it.

`plugins/onnx_op.py` writes an op's node, `plugins/<op>/onnx_body.py` its function, and `lowering/aten_to_onnx.py` every
other operator. The model is never in memory: weights are streamed in pieces.
"""

from collections import Counter
from collections.abc import Callable
from pathlib import Path

import onnx
import onnx_ir as ir

from nemotrt.exporter.artifacts import LoweredGraph, TracedModel
from nemotrt.exporter.checkpoint.loaded_model import LoadedModel
from nemotrt.exporter.errors import LowerError
from nemotrt.exporter.lowering import data_layout, external_data
from nemotrt.exporter.lowering.graph_writer import write_graph
from nemotrt.exporter.progress import Advance, ignore
from nemotrt.plugins.contract import DType
from nemotrt.plugins.spec import DOMAIN

OPS_OF_KIND = {
    "mamba": ("NemoCausalConv1d", "NemoSelectiveScan"),
    "attention": ("NemoPagedAttention",),
    "moe": ("NemoMoeDispatch",),
    "mlp": (),
}
"""A layer's kind → the ops that the graph must have for it."""


def lower(
    model: LoadedModel,
    traced: TracedModel,
    path: Path,
    *,
    link: bool = False,
    resume_from: int = 0,
    advance: Advance = ignore,
    synced: Callable[[int], None] = ignore,
) -> LoweredGraph:
    """The graph at `path`, and its weights in a data file next to it.

    With `link`, tensors that need no conversion stay in the checkpoint's files, which are linked into the graph's
    folder. `resume_from`, `advance` and `synced` are those of `external_data.write`.
    Raises LowerError when the graph does not match the configuration, CheckpointError on an invalid weight.
    """
    graph = write_graph(traced)
    ops = Counter(node.op_type for node in graph.graph if node.domain == DOMAIN)
    expected = Counter(op for kind in model.config.layers for op in OPS_OF_KIND[kind])
    if ops != expected:
        raise LowerError(f"the graph has {dict(ops)}, but the configuration needs {dict(expected)}")
    parameters = {
        name: value for name, value in graph.graph.initializers.items() if value.const_value is None
    }
    _check_all_used(model, parameters)
    recorded = {name: traced.parameters[name] for name in parameters}
    placed = data_layout.lay_out(
        [
            (model.weights[name], tuple(tensor.shape), DType.from_torch(tensor.dtype))
            for name, tensor in recorded.items()
        ],
        link=link,
    )
    data = data_layout.data_path(path)
    external_data.write(data, placed, resume_from=resume_from, advance=advance, synced=synced)
    for (name, value), place in zip(parameters.items(), placed, strict=True):
        value.const_value = ir.ExternalTensor(
            place.linked.name if place.linked else data.name,
            place.offset,
            place.length,
            ir.DataType(place.dtype.onnx),
            shape=ir.Shape(place.shape),
            name=name,
            base_dir=path.parent,
        )
    proto = ir.to_proto(graph)
    path.write_bytes(proto.SerializeToString(deterministic=True))
    _check_onnx(proto)
    shards = sorted({place.linked for place in placed if place.linked})
    for shard in shards:
        external_data.link(shard, path.parent)
    return LoweredGraph(
        path=path,
        nodes=len(graph.graph),
        ops=dict(ops),
        weight_bytes=sum(place.length for place in placed),
    )


def _check_all_used(model: LoadedModel, parameters: dict[str, ir.Value]) -> None:
    """Raise LowerError when the graph leaves a weight out; tied weights are in it under one of their names."""
    used = {model.weights[name].tensors for name in parameters} - {()}
    for name, source in model.weights.items():
        if name not in parameters and source.tensors not in used:
            raise LowerError(f"{name} is not used by the graph")


def _check_onnx(proto: onnx.ModelProto) -> None:
    """Raise LowerError when ONNX rejects the graph, whose weights become inputs here."""
    # ONNX's checker would look for the weights' files, and reject those with a second hard link.
    graph = proto.graph
    weights = [tensor for tensor in graph.initializer if tensor.external_data]
    for tensor in weights:
        graph.initializer.remove(tensor)
        graph.input.append(onnx.helper.make_tensor_value_info(tensor.name, tensor.data_type, tensor.dims))
    try:
        onnx.checker.check_model(proto)
        # Each value carries the shape that PyTorch recorded; strict inference fails where ONNX infers another.
        onnx.shape_inference.infer_shapes(proto, strict_mode=True)
    except (onnx.checker.ValidationError, onnx.shape_inference.InferenceError) as error:
        raise LowerError(f"ONNX rejects the graph: {str(error).splitlines()[0]}") from error
