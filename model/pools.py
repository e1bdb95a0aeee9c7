"""The pools of recurrent and KV state that a model's caller owns."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from nemotrt.model.config import ModelConfig

if TYPE_CHECKING:
    import torch
    from torch import Tensor

POOL_KINDS: dict[str, tuple[str, ...]] = {
    "mamba": ("conv_state", "ssm_state"),
    "attention": ("kv_cache",),
    "mlp": (),
    "moe": (),
}
"""A layer's kind → the pools it reads and replaces, in the order in which its mixer takes them."""


@dataclass(frozen=True)
class PoolSpec:
    """One pool: a row a slot, or for `kv_cache` a row a page; row 0 is scratch."""

    name: str
    """The kind and the layer's index in the model: `ssm_state.7`."""
    kind: str
    layer: int
    row_shape: tuple[int, ...]
    dtype: str

    @property
    def is_paged(self) -> bool:
        """Whether rows are pages, not slots."""
        return self.kind == "kv_cache"


def pool_specs(
    config: ModelConfig,
    *,
    page_size: int = 128,
    dtype: str,
    state_dtype: str,
    kv_dtype: str,
) -> tuple[PoolSpec, ...]:
    """Every pool of the model, in layer order.

    `dtype` is the model's, `state_dtype` the recurrent state's, `kv_dtype` the KV cache's. Rows: conv_state
    [channels, taps−1], ssm_state [heads, head_dim, state], kv_cache [2, kv_heads, page_size, head_dim].
    """
    rows = {
        "conv_state": (config.conv_channels, config.conv_kernel - 1),
        "ssm_state": (config.mamba_num_heads, config.mamba_head_dim, config.ssm_state_size),
        "kv_cache": (2, config.num_key_value_heads, page_size, config.head_dim),
    }
    dtypes = {"conv_state": dtype, "ssm_state": state_dtype, "kv_cache": kv_dtype}
    return tuple(
        PoolSpec(f"{kind}.{i}", kind, i, rows[kind], dtypes[kind])
        for i, layer in config.numbered_layers.items()
        for kind in POOL_KINDS[layer]
    )


def empty_pools(
    specs: tuple[PoolSpec, ...], num_slots: int, num_pages: int, device: torch.device | str | None = None
) -> list[Tensor]:
    """A zeroed pool for each spec, with rows for slots or pages, scratch included."""
    import torch

    return [
        torch.zeros(
            num_pages if spec.is_paged else num_slots,
            *spec.row_shape,
            dtype=getattr(torch, spec.dtype),
            device=device,
        )
        for spec in specs
    ]
