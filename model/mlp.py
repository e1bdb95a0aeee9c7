"""The MLP mixer, with squared ReLU and without a gate. Legend: T tokens, D hidden size, F inner size."""

import torch
from torch import Tensor, nn

from nemotrt.model.config import ModelConfig
from nemotrt.model.step import Step


class MLP(nn.Module):
    """down(relu(up x)²) (So et al. 2021, arXiv 2109.08668, section 3); has no state."""

    def __init__(
        self,
        config: ModelConfig,
        *,
        inner_size: int | None = None,
        dtype: torch.dtype,
        device: torch.device | str | None = None,
    ) -> None:
        super().__init__()
        hidden, biased = config.hidden_size, config.mlp_bias
        inner_size = config.intermediate_size if inner_size is None else inner_size
        self.up_proj = nn.Linear(hidden, inner_size, bias=biased, dtype=dtype, device=device)
        self.down_proj = nn.Linear(inner_size, hidden, bias=biased, dtype=dtype, device=device)

    def forward(self, x_TD: Tensor, step: Step) -> tuple[Tensor]:
        """[T, D] → [T, D]; tokens are independent, so the step is unused."""
        hidden_TF = torch.relu(self.up_proj(x_TD)).square()
        return (self.down_proj(hidden_TF),)
