"""A graph as text: what it takes and gives, its weights and every node with what flows between them; no values."""

from __future__ import annotations

from pathlib import Path

import onnx

from nemotrt.exporter.config import BuildConfig
from nemotrt.exporter.stages.load import load
from nemotrt.exporter.stages.lower import lower
from nemotrt.exporter.stages.trace import trace


def graph_text(checkpoint: Path, folder: Path) -> str:
    """The graph that a build of the checkpoint writes, lowered into the folder."""
    config = BuildConfig(checkpoint, folder / "bundle", precision="bf16", runtime="onnx")
    model = load(checkpoint)
    graph = lower(model, trace(model, config), folder / "model.onnx")
    return as_text(onnx.load(graph.path, load_external_data=False))


def as_text(model: onnx.ModelProto) -> str:
    """The graph in sections, one thing a line, nodes in the order in which they run."""
    graph = model.graph
    types = {value.name: _type(value) for value in (*graph.input, *graph.value_info, *graph.output)}
    lines = [f"opset {entry.domain or 'ai.onnx'} {entry.version}" for entry in model.opset_import]
    lines += ["", "inputs", *(f"  {value.name} {types[value.name]}" for value in graph.input)]
    lines += ["", "outputs", *(f"  {value.name} {types[value.name]}" for value in graph.output)]
    lines += ["", "weights"]
    for tensor in graph.initializer:
        lines.append(f"  {tensor.name} {_typed(tensor.data_type, list(tensor.dims))}")
    lines += ["", "nodes"]
    for node in graph.node:
        lines.append(f"  {node.name}: {_operator(node)}")
        lines += [f"    <- {name}" for name in node.input]
        lines += [f"    -> {name} {types.get(name, '?')}" for name in node.output]
    lines += ["", "functions"]
    for function in model.functions:
        lines.append(f"  {function.name}({', '.join(function.input)}) -> {', '.join(function.output)}")
    return "\n".join(lines) + "\n"


def _operator(node: onnx.NodeProto) -> str:
    name = f"{node.domain}.{node.op_type}" if node.domain else node.op_type
    attributes = sorted(f"{item.name}={_value(item)}" for item in node.attribute)
    return f"{name} {' '.join(attributes)}".rstrip()


def _value(attribute: onnx.AttributeProto) -> str:
    value = onnx.helper.get_attribute_value(attribute)
    return (
        value.decode()
        if isinstance(value, bytes)
        else f"{value:.6g}"
        if isinstance(value, float)
        else str(value)
    )


def _type(value: onnx.ValueInfoProto) -> str:
    tensor = value.type.tensor_type
    return _typed(tensor.elem_type, [axis.dim_param or axis.dim_value for axis in tensor.shape.dim])


def _typed(element: int, axes: list[str | int]) -> str:
    return f"{onnx.TensorProto.DataType.Name(element).lower()}[{', '.join(map(str, axes))}]"
