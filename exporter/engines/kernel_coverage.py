"""Whether the ops' kernels cover a model: from its configuration alone, and later for every op node of its graph."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, NamedTuple

from nemotrt.exporter.config import BuildConfig
from nemotrt.exporter.engines.shape_profiles import EngineProfile
from nemotrt.exporter.errors import CompileError
from nemotrt.exporter.runtime.graph_file import OnnxGraph, summarize
from nemotrt.exporter.runtime.step import pages_of
from nemotrt.model.config import ModelConfig
from nemotrt.plugins.contract import DType, PoolSpec
from nemotrt.plugins.library import PluginError, PluginLibrary
from nemotrt.plugins.spec import DOMAIN, VERSION, OpSpec, ops

if TYPE_CHECKING:
    from onnx import GraphProto, NodeProto

Axes = tuple[str | int, ...]


class OpCall(NamedTuple):
    """An op as one kind of layer calls it in the largest step: its axes and attributes, and its dtypes."""

    layer: str
    """The kind of layer."""
    op: str
    sizes: dict[str, int]
    dtypes: dict[str, DType]


def op_calls(model: ModelConfig, config: BuildConfig, pools: Sequence[PoolSpec]) -> Iterator[OpCall]:
    """The ops of each kind of layer in the model; all layers of one kind call them alike.

    `config` has the precision, `pools` are those of the graph.
    """
    X = config.dtype
    pool_dtypes = {pool.kind: pool.dtype for pool in pools}
    step = {"T": config.max_tokens, "B": config.max_sequences}
    if "mamba" in model.layers:
        yield OpCall(
            "mamba", "causal_conv1d", step | {"C": model.conv_channels, "K": model.conv_kernel}, {"X": X}
        )
        heads = {"H": model.mamba_num_heads, "P": model.mamba_head_dim, "G": model.n_groups}
        dtypes = {"X": X, "STATE": pool_dtypes["ssm_state"]}
        yield OpCall("mamba", "selective_scan", step | heads | {"N": model.ssm_state_size}, dtypes)
    if "attention" in model.layers:
        heads = {"Q": model.num_attention_heads, "V": model.num_key_value_heads, "D": model.head_dim}
        pages = {"page": config.page_size, "M": pages_of(config.max_context, config.page_size)}
        yield OpCall(
            "attention", "paged_attention", step | heads | pages, {"X": X, "CACHE": pool_dtypes["kv_cache"]}
        )
    if "moe" in model.layers:
        experts = {"R": model.n_routed_experts, "E": model.n_routed_experts, "first_expert": 0}
        widths = {"L": model.expert_size, "I": model.moe_intermediate_size}
        groups = {"num_groups": model.n_group, "topk_group": model.topk_group}
        routing = groups | {"top_k": model.num_experts_per_tok}
        weight = DType.FLOAT8_E4M3 if config.precision == "fp8" else X
        yield OpCall("moe", "moe_dispatch", step | experts | widths | routing, {"X": X, "W": weight})


def check_supported(
    model: ModelConfig, config: BuildConfig, pools: Sequence[PoolSpec], sms: Sequence[int]
) -> None:
    """Raise CompileError with a layer, its op, what no kernel supports on one of the SMs, and what they support."""
    specs = {spec.torch_name: spec for spec in ops()}
    first = {kind: index for index, kind in reversed(model.numbered_layers.items())}
    for call in op_calls(model, config, pools):
        spec = specs[call.op]
        for sm in sms:
            try:
                spec.supports()(call.sizes, call.dtypes, sm)
            except ValueError as error:
                raise CompileError(
                    f"no engine can be built: layers.{first[call.layer]}.mixer.{spec.label}: {error}",
                    hint="--runtime onnx builds the bundle without engines",
                ) from error


class PluginNode(NamedTuple):
    """An op's node: its attributes, and the dtype and axes of each input."""

    name: str
    spec: OpSpec
    attributes: dict[str, int | float]
    inputs: tuple[tuple[str, Axes], ...]


def plugin_nodes(graph: OnnxGraph) -> tuple[PluginNode, ...]:
    """Every op node of the graph, in order.

    Raises CompileError if an op is unknown or of another version, or if TensorRT would not recognize it as a plugin.
    """
    from onnx import helper

    tensors = _tensors(graph.proto.graph)
    specs = {spec.name: spec for spec in ops()}
    nodes = []
    for node in graph.proto.graph.node:
        if node.domain == DOMAIN:
            attributes = {field.name: helper.get_attribute_value(field) for field in node.attribute}
            _check(node, {name: _text(value) for name, value in attributes.items()}, specs)
            spec = specs[node.op_type]
            chosen = {name: attributes[name] for name in spec.attributes}
            nodes.append(PluginNode(node.name, spec, chosen, tuple(tensors[name] for name in node.input)))
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

    values = map(summarize, (*graph.input, *graph.value_info, *graph.output))
    tensors = {value.name: (value.dtype, value.axes) for value in values}
    for weight in graph.initializer:
        tensors[weight.name] = (helper.tensor_dtype_to_np_dtype(weight.data_type).name, tuple(weight.dims))
    return tensors


def check_kernels(
    nodes: Sequence[PluginNode], profiles: Sequence[EngineProfile], library: PluginLibrary, sms: Sequence[int]
) -> None:
    """Raise CompileError if a node has no kernel on one of the SMs at the min, opt or max shapes of a profile.

    A plugin selects its kernels when it runs, so a GPU would report this in the first step only.
    """
    # Nodes that agree in these launch the same kernels.
    forms = {(node.spec.name, *node.attributes.items(), node.inputs): node for node in reversed(nodes)}
    for node in reversed(forms.values()):
        try:
            plugin = library.plugin(node.spec, node.attributes, node.name)
            dtypes = [dtype for dtype, _ in node.inputs]
            for profile in profiles:
                corners = [profile.shapes(axes) for _, axes in node.inputs]
                for shapes in zip(*corners, strict=True):
                    plugin.shape(list(zip(dtypes, shapes, strict=True)))
                    for sm in sms:
                        plugin.launches(sm)
        except PluginError as error:
            raise CompileError(
                f"no engine can be built: {error}", hint="--runtime onnx builds the bundle without engines"
            ) from error
