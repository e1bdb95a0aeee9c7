"""One step's inputs that every layer reads, and the pools of recurrent state and KV cache that it updates."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, NamedTuple

from nemotrt.model.config import ModelConfig
from nemotrt.plugins.contract import DType, PoolSpec

if TYPE_CHECKING:
    from torch import Tensor


class Step(NamedTuple):
    """The B sequences of one step over packed tokens, with up to M pages each; all tensors are int32.

    vLLM calls a page table a block table. Slot 0 and page 0 are scratch. An empty sequence (two equal starts)
    leaves its state unchanged.
    """

    query_start: Tensor
    """[B+1]: sequence b owns tokens query_start[b] : query_start[b+1]; tokens from query_start[B] on are padding."""
    context_len: Tensor
    """[B]: tokens already in the sequence's state; 0 means a new sequence, whose slot's old contents are ignored."""
    slot: Tensor
    """[B]: the sequence's row in the recurrent pools."""
    page_table: Tensor
    """[B, M]: the sequence's pages in the KV pools; unused entries are 0."""


POOL_KINDS: dict[str, tuple[str, ...]] = {
    "mamba": ("conv_state", "ssm_state"),
    "attention": ("kv_cache",),
    "mlp": (),
    "moe": (),
}
"""The pools that a layer of each kind updates, in the order in which its mixer takes them."""


def pool_specs(
    config: ModelConfig,
    *,
    page_size: int = 128,
    dtype: DType,
    state_dtype: DType = DType.FLOAT32,
    kv_dtype: DType | None = None,
) -> tuple[PoolSpec, ...]:
    """Every pool of the model, in layer order.

    `dtype` is the model's and `state_dtype` the recurrent state's. `kv_dtype` defaults to FP8 if the checkpoint
    asks for an FP8 cache, else to `dtype`.
    """
    if kv_dtype is None:
        kv_dtype = DType.FLOAT8_E4M3 if config.recipe.kv_cache else dtype
    rows = {
        "conv_state": (dtype, (config.conv_channels, config.conv_kernel - 1)),
        "ssm_state": (state_dtype, (config.mamba_num_heads, config.mamba_head_dim, config.ssm_state_size)),
        "kv_cache": (kv_dtype, (2, config.num_key_value_heads, page_size, config.head_dim)),
    }
    return tuple(
        PoolSpec(f"{kind}.{i}", *rows[kind])
        for i, layer in config.numbered_layers.items()
        for kind in POOL_KINDS[layer]
    )


def empty_pools(
    specs: Iterable[PoolSpec], num_slots: int, num_pages: int, device: str = "cpu"
) -> list[Tensor]:
    """A zeroed tensor for each pool; the numbers of slots and pages include the scratch row."""
    import torch

    return [
        torch.zeros(spec.shape(num_slots, num_pages), dtype=spec.dtype.torch, device=device) for spec in specs
    ]
