"""RMS norms, computed in FP32. Legend: T tokens, D hidden size, I inner size, G groups."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class RMSNorm(nn.Module):
    """x / √(mean x² + eps) · weight, computed in FP32 (Zhang, Sennrich 2019, arXiv 1910.07467)."""

    def __init__(self, size: int, eps: float, *, device: torch.device | str | None = None) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(size, dtype=torch.float32, device=device))

    def forward(self, x_TD: Tensor) -> Tensor:
        """[T, D] → [T, D] in x's dtype."""
        return F.rms_norm(x_TD.float(), self.weight.shape, self.weight, self.eps).to(x_TD.dtype)


class GatedGroupRMSNorm(nn.Module):
    """RMS norm over each group of y · silu(z), computed in FP32.

    The gate is applied before the norm; mamba_ssm calls this `norm_before_gate=False`.
    """

    def __init__(
        self, size: int, num_groups: int, eps: float, *, device: torch.device | str | None = None
    ) -> None:
        super().__init__()
        self.eps = eps
        self.num_groups = num_groups
        self.group_size = size // num_groups
        self.weight = nn.Parameter(torch.ones(size, dtype=torch.float32, device=device))

    def forward(self, y_TI: Tensor, z_TI: Tensor) -> Tensor:
        """y and its gate z, both [T, I], → [T, I] in y's dtype."""
        gated_TI = y_TI.float() * F.silu(z_TI.float())
        gated_TGS = torch.unflatten(gated_TI, 1, (self.num_groups, self.group_size))
        normed_TI = F.rms_norm(gated_TGS, (self.group_size,), eps=self.eps).flatten(1)
        return (normed_TI * self.weight).to(y_TI.dtype)
