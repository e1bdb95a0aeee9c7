"""The op nodes of a graph as a plugin sees them, and whether a plugin library has the kernels that they need."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from nemotrt.exporter.engines.shape_profiles import EngineProfile
from nemotrt.exporter.errors import CompileError
from nemotrt.exporter.runtime.graph_file import OnnxGraph
from nemotrt.plugins.library import PluginError, PluginLibrary
from nemotrt.plugins.spec import DOMAIN, VERSION, OpSpec, ops

if TYPE_CHECKING:
    from onnx import GraphProto, NodeProto

Axes = tuple[str | int, ...]


@dataclass(frozen=True, eq=False)
class PluginNode:
    """One node: its attributes, and each input's dtype and axes."""

    name: str
    spec: OpSpec
    attributes: dict[str, int | float]
    inputs: tuple[tuple[str, Axes], ...]

    @property
    def form(self) -> tuple[object, ...]:
        """What decides the kernels that the node launches: nodes of one form need the same."""
        return (self.spec.name, tuple(self.attributes.items()), self.inputs)


def plugin_nodes(path: Path) -> tuple[PluginNode, ...]:
    """Every op node of the graph, in order.

    Raises CompileError on an op of another version than this package's, of an unknown kind, or that TensorRT
    would take for something else.
    """
    from onnx import helper

    graph = OnnxGraph.read(path).proto.graph
    tensors = _tensors(graph)
    specs = {spec.name: spec for spec in ops()}
    found = []
    for node in graph.node:
        if node.domain != DOMAIN:
            continue
        attributes = {one.name: helper.get_attribute_value(one) for one in node.attribute}
        _check(node, {name: _text(value) for name, value in attributes.items()}, specs)
        spec = specs[node.op_type]
        found.append(
            PluginNode(
                name=node.name,
                spec=spec,
                attributes={name: attributes[name] for name in spec.attributes},
                inputs=tuple(tensors[name] for name in node.input),
            )
        )
    return tuple(found)


def _text(value: object) -> str:
    return value.decode(errors="replace") if isinstance(value, bytes) else str(value)


def _check(node: NodeProto, attributes: Mapping[str, str], specs: Mapping[str, OpSpec]) -> None:
    version = attributes.get("plugin_version", "")
    if version != str(VERSION):
        raise CompileError(
            f"{node.name}: {node.op_type} is of op version {version or 'none'},"
            f" this nemo-export has version {VERSION}",
            hint="export the graph again, or use the nemo-export that wrote it",
        )
    if node.op_type not in specs:
        raise CompileError(f"{node.name}: {node.op_type} is no op of this nemo-export")
    missing = [name for name in specs[node.op_type].attributes if name not in attributes]
    if attributes.get("plugin_namespace") != DOMAIN:
        missing.insert(0, f"plugin_namespace {DOMAIN}")
    if missing:
        raise CompileError(f"{node.name}: {node.op_type} has no attribute {missing[0]}")


def _tensors(graph: GraphProto) -> dict[str, tuple[str, Axes]]:
    """Dtype and axes of every value whose shape the graph says."""
    from onnx import helper

    found: dict[str, tuple[str, Axes]] = {}
    for value in (*graph.input, *graph.value_info, *graph.output):
        tensor = value.type.tensor_type
        axes = tuple(size.dim_param or size.dim_value for size in tensor.shape.dim)
        found[value.name] = (helper.tensor_dtype_to_np_dtype(tensor.elem_type).name, axes)
    for weight in graph.initializer:
        found[weight.name] = (helper.tensor_dtype_to_np_dtype(weight.data_type).name, tuple(weight.dims))
    return found


def check_kernels(
    nodes: Sequence[PluginNode],
    profiles: Sequence[EngineProfile],
    library: PluginLibrary,
    sms: Sequence[int],
) -> None:
    """Raise CompileError where a node has no kernel for one of the SMs, at any corner of a profile.

    On a GPU this would be found at the first step only, since a plugin chooses its kernels when it runs.
    """
    forms = {node.form: node for node in reversed(nodes)}
    for node in reversed(forms.values()):
        try:
            plugin = library.plugin(node.spec, node.attributes, node.name)
            for profile in profiles:
                corners = [profile.shapes(axes) for _, axes in node.inputs]
                for corner in range(3):
                    shapes = [
                        (dtype, shapes[corner])
                        for (dtype, _), shapes in zip(node.inputs, corners, strict=True)
                    ]
                    plugin.shape(shapes)
                    for sm in sms:
                        plugin.launches(sm)
        except PluginError as error:
            raise CompileError(
                f"no engine can be built: {error}", hint="--runtime onnx builds the bundle without engines"
            ) from error
