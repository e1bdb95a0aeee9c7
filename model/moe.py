"""The MLP mixer, and the mixture-of-experts mixer with or without a latent projection.

Legend: T tokens, D hidden size, F the MLP's inner size, L expert input size, E experts.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import nemotrt.plugins.torch_op  # noqa: F401  registers torch.ops.nemo
from nemotrt.model.config import ModelConfig
from nemotrt.model.step import Step


class MLP(nn.Module):
    """down(relu(up x)²) (So et al. 2021, arXiv 2109.08668, section 3); has no state."""

    def __init__(self, config: ModelConfig, inner_size: int | None = None, *, dtype: torch.dtype) -> None:
        super().__init__()
        hidden, biased = config.hidden_size, config.mlp_bias
        inner_size = config.intermediate_size if inner_size is None else inner_size
        self.up_proj = nn.Linear(hidden, inner_size, bias=biased, dtype=dtype)
        self.down_proj = nn.Linear(inner_size, hidden, bias=biased, dtype=dtype)

    def forward(self, x_TD: Tensor, step: Step) -> tuple[Tensor]:
        """[T, D] → [T, D]; tokens are independent, so the step is unused."""
        hidden_TF = torch.relu(self.up_proj(x_TD)).square()
        return (self.down_proj(hidden_TF),)


class Router(nn.Module):
    """Computes the experts' logits in FP32; the correction bias affects which experts are chosen, not their weights."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        experts, hidden = config.n_routed_experts, config.hidden_size
        self.weight = nn.Parameter(torch.zeros(experts, hidden, dtype=torch.float32))
        self.e_score_correction_bias = nn.Parameter(torch.zeros(experts, dtype=torch.float32))

    def forward(self, x_TD: Tensor) -> Tensor:
        """[T, D] → logits [T, E] FP32."""
        return F.linear(x_TD.float(), self.weight)


class Experts(nn.Module):
    """The stacked weights of the routed experts, with one scale per output that multiplies FP8 weights (else 1.0)."""

    def __init__(self, config: ModelConfig, *, dtype: torch.dtype) -> None:
        super().__init__()
        experts, size, inner = config.n_routed_experts, config.expert_size, config.moe_intermediate_size
        self.up = nn.Parameter(torch.zeros(experts, inner, size, dtype=dtype))
        self.down = nn.Parameter(torch.zeros(experts, size, inner, dtype=dtype))
        self.up_scale = nn.Parameter(torch.ones(experts, inner, dtype=torch.float32))
        self.down_scale = nn.Parameter(torch.ones(experts, size, dtype=torch.float32))
        self.input_scale = nn.Parameter(torch.ones(1, dtype=torch.float32))
        self.hidden_scale = nn.Parameter(torch.ones(1, dtype=torch.float32))


class MoE(nn.Module):
    """fc2(Σ w · expert(fc1 x)) + shared(x); without a latent, fc1 and fc2 are the identity."""

    def __init__(self, config: ModelConfig, *, dtype: torch.dtype) -> None:
        super().__init__()
        self.routing: dict[str, Any] = {
            "top_k": config.num_experts_per_tok,
            "num_groups": config.n_group,
            "topk_group": config.topk_group,
            "norm_topk_prob": int(config.norm_topk_prob),
            "routed_scaling_factor": config.routed_scaling_factor,
        }
        """The attributes of the op that choose a token's experts and weigh them."""
        self.gate = Router(config)
        self.experts = Experts(config, dtype=dtype)
        self.shared_experts = MLP(config, config.moe_shared_expert_intermediate_size, dtype=dtype)
        self.fc1_latent_proj: nn.Module = nn.Identity()
        self.fc2_latent_proj: nn.Module = nn.Identity()
        if config.moe_latent_size:
            hidden, latent, biased = config.hidden_size, config.moe_latent_size, config.mlp_bias
            self.fc1_latent_proj = nn.Linear(hidden, latent, bias=biased, dtype=dtype)
            self.fc2_latent_proj = nn.Linear(latent, hidden, bias=biased, dtype=dtype)

    def forward(self, x_TD: Tensor, step: Step) -> tuple[Tensor]:
        """[T, D] → [T, D]; tokens are independent, so the step is unused."""
        routed_TL = torch.ops.nemo.moe_dispatch(
            self.fc1_latent_proj(x_TD),
            self.gate(x_TD),
            self.gate.e_score_correction_bias,
            self.experts.up,
            self.experts.down,
            self.experts.up_scale,
            self.experts.down_scale,
            self.experts.input_scale,
            self.experts.hidden_scale,
            **self.routing,
            first_expert=0,
        )
        (shared_TD,) = self.shared_experts(x_TD, step)
        return (self.fc2_latent_proj(routed_TL) + shared_TD,)
