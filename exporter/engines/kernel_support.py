"""Checks from the configuration alone whether the ops' kernels support a model's sizes and dtypes."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

from nemotrt.exporter.config import BuildConfig
from nemotrt.exporter.errors import CompileError
from nemotrt.exporter.runtime.step import pages_of
from nemotrt.model.config import ModelConfig
from nemotrt.plugins.contract import DType, PoolSpec
from nemotrt.plugins.spec import ops


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
