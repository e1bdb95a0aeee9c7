"""The op nodes of a graph, and the check that a plugin library has every kernel they launch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
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
    """An op's node: its attributes, and the dtype and axes of each input."""

    name: str
    spec: OpSpec
    attributes: dict[str, int | float]
    inputs: tuple[tuple[str, Axes], ...]

    @property
    def form(self) -> tuple[object, ...]:
        """Everything that selects the node's kernels: nodes with the same form launch the same ones."""
        return (self.spec.name, tuple(self.attributes.items()), self.inputs)


def plugin_nodes(graph: OnnxGraph) -> tuple[PluginNode, ...]:
    """Every op node of the graph, in order.

    Raises CompileError if an op is unknown or of another version, or if TensorRT would not recognize it as a plugin.
    """
    from onnx import helper

    tensors = _tensors(graph.proto.graph)
    specs = {spec.name: spec for spec in ops()}
    nodes = []
    for node in graph.proto.graph.node:
        if node.domain != DOMAIN:
            continue
        attributes = {attribute.name: helper.get_attribute_value(attribute) for attribute in node.attribute}
        _check(node, {name: _text(value) for name, value in attributes.items()}, specs)
        spec = specs[node.op_type]
        nodes.append(
            PluginNode(
                name=node.name,
                spec=spec,
                attributes={name: attributes[name] for name in spec.attributes},
                inputs=tuple(tensors[name] for name in node.input),
            )
        )
    return tuple(nodes)


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
        raise CompileError(f"{node.name}: {node.op_type} is not an op of this nemo-export")
    missing = [name for name in specs[node.op_type].attributes if name not in attributes]
    if attributes.get("plugin_namespace") != DOMAIN:
        missing.insert(0, f"plugin_namespace {DOMAIN}")
    if missing:
        raise CompileError(f"{node.name}: {node.op_type} has no attribute {missing[0]}")


def _tensors(graph: GraphProto) -> dict[str, tuple[str, Axes]]:
    """The dtype and axes of every value with a shape in the graph."""
    from onnx import helper

    tensors: dict[str, tuple[str, Axes]] = {}
    for value in (*graph.input, *graph.value_info, *graph.output):
        tensor = value.type.tensor_type
        axes = tuple(size.dim_param or size.dim_value for size in tensor.shape.dim)
        tensors[value.name] = (helper.tensor_dtype_to_np_dtype(tensor.elem_type).name, axes)
    for weight in graph.initializer:
        tensors[weight.name] = (helper.tensor_dtype_to_np_dtype(weight.data_type).name, tuple(weight.dims))
    return tensors


def check_kernels(
    nodes: Sequence[PluginNode],
    profiles: Sequence[EngineProfile],
    library: PluginLibrary,
    sms: Sequence[int],
) -> None:
    """Raise CompileError if a node has no kernel on one of the SMs at the min, opt or max shapes of a profile.

    A plugin selects its kernels when it runs, so a GPU would report this in the first step only.
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
