"""One layer: a norm, a mixer of the layer's kind, and the residual. Legend: T tokens, D hidden size."""

import torch
from torch import Tensor, nn

from nemotrt.model.attention import AttentionMixer
from nemotrt.model.config import ModelConfig
from nemotrt.model.mamba import MambaMixer
from nemotrt.model.mlp import MLP
from nemotrt.model.moe import MoE
from nemotrt.model.norm import RMSNorm
from nemotrt.model.step import Step


class Block(nn.Module):
    """x + mixer(norm(x)), the residual in x's dtype; for inference, so without gradients."""

    def __init__(
        self, config: ModelConfig, kind: str, *, dtype: torch.dtype, device: torch.device | str | None = None
    ) -> None:
        super().__init__()
        self.kind = kind
        self.norm = RMSNorm(config.hidden_size, config.norm_eps, device=device)
        self.mixer = _mixer(config, kind, dtype=dtype, device=device)
        self.requires_grad_(False)

    def forward(self, x_TD: Tensor, step: Step, *pools: Tensor) -> tuple[Tensor, ...]:
        """[T, D] and this layer's pools, in the order of POOL_KINDS → [T, D] and each pool after the step."""
        mixed_TD, *next_pools = self.mixer(self.norm(x_TD), step, *pools)
        return (x_TD + mixed_TD, *next_pools)


def _mixer(
    config: ModelConfig, kind: str, *, dtype: torch.dtype, device: torch.device | str | None
) -> nn.Module:
    match kind:
        case "mamba":
            return MambaMixer(config, dtype=dtype, device=device)
        case "attention":
            return AttentionMixer(config, dtype=dtype, device=device)
        case "mlp":
            return MLP(config, inner_size=config.intermediate_size, dtype=dtype, device=device)
        case "moe":
            return MoE(config, dtype=dtype, device=device)
    raise AssertionError(f"ModelConfig let through a layer of kind {kind}")
