"""One layer: the norm, the mixer of the layer's kind, and the residual.

Legend: T tokens, D hidden size.
"""

import torch
from torch import Tensor, nn

from nemotrt.model.attention import AttentionMixer
from nemotrt.model.config import ModelConfig
from nemotrt.model.mamba import MambaMixer
from nemotrt.model.mlp import MLP
from nemotrt.model.moe import MoE
from nemotrt.model.norm import RMSNorm
from nemotrt.model.step import Step

MIXERS: dict[str, type[nn.Module]] = {
    "mamba": MambaMixer,
    "attention": AttentionMixer,
    "mlp": MLP,
    "moe": MoE,
}


class Block(nn.Module):
    """x + mixer(norm(x)) with the residual in x's dtype; inference only, without gradients."""

    def __init__(
        self, config: ModelConfig, kind: str, *, dtype: torch.dtype, device: torch.device | str | None = None
    ) -> None:
        super().__init__()
        self.kind = kind
        self.norm = RMSNorm(config.hidden_size, config.norm_eps, device=device)
        self.mixer = MIXERS[kind](config, dtype=dtype, device=device)
        self.requires_grad_(False)

    def forward(self, x_TD: Tensor, step: Step, *pools: Tensor) -> tuple[Tensor, ...]:
        """Returns [T, D] and this layer's pools after the step; pools are in the order of POOL_KINDS."""
        mixed_TD, *next_pools = self.mixer(self.norm(x_TD), step, *pools)
        return (x_TD + mixed_TD, *next_pools)
