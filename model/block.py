"""One layer: the norm, the mixer of the layer's kind, and the residual.

Legend: T tokens, D hidden size.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nemotrt.model.attention import AttentionMixer
from nemotrt.model.config import ModelConfig
from nemotrt.model.mamba import MambaMixer
from nemotrt.model.moe import MLP, MoE
from nemotrt.model.step import Step

MIXERS = {"mamba": MambaMixer, "attention": AttentionMixer, "mlp": MLP, "moe": MoE}


class RMSNorm(nn.Module):
    """x / √(mean x² + eps) · weight, computed in FP32 (Zhang, Sennrich 2019, arXiv 1910.07467)."""

    def __init__(self, size: int, eps: float) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(size, dtype=torch.float32))

    def forward(self, x_TD: Tensor) -> Tensor:
        """[T, D] → [T, D] in x's dtype."""
        return F.rms_norm(x_TD.float(), self.weight.shape, self.weight, self.eps).to(x_TD.dtype)


class Block(nn.Module):
    """x + mixer(norm(x)) with the residual in x's dtype; inference only, without gradients."""

    def __init__(self, config: ModelConfig, kind: str, *, dtype: torch.dtype) -> None:
        super().__init__()
        self.kind = kind
        self.norm = RMSNorm(config.hidden_size, config.norm_eps)
        self.mixer = MIXERS[kind](config, dtype=dtype)
        self.requires_grad_(False)

    def forward(self, x_TD: Tensor, step: Step, *pools: Tensor) -> tuple[Tensor, ...]:
        """Returns [T, D] and this layer's pools after the step; pools are in the order of POOL_KINDS."""
        mixed_TD, *next_pools = self.mixer(self.norm(x_TD), step, *pools)
        return (x_TD + mixed_TD, *next_pools)
