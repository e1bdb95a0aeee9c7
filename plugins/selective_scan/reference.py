"""The reference that defines correct results, in plain PyTorch.

Legend: T tokens, B sequences, H heads, P head dim, G groups, N state size, S slots.
"""

from itertools import pairwise

import torch
from torch import Tensor


def reference(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor,
    dt_bias: Tensor,
    ssm_state: Tensor,
    query_start: Tensor,
    context_len: Tensor,
    slot: Tensor,
    *,
    dt_min: float,
    dt_max: float,
) -> tuple[Tensor, Tensor]:
    """y [T, H, P] and the next pool [S, H, P, N]; y of padding is 0, and an empty sequence's state does not change.

    Token by token (Dao and Gu 2024, arXiv 2405.21060, equation 2 with a scalar A per head):
    Δ = clamp(softplus(dt + dt_bias), dt_min, dt_max); h ← exp(Δ·A)·h + Δ·B ⊗ x; y = C·h + D·x. Computed in FP32,
    or in FP64 for FP64 inputs.
    """
    compute = torch.promote_types(x.dtype, torch.float32)
    per_group = x.shape[1] // B.shape[1]
    delta_TH = torch.nn.functional.softplus(dt.to(compute) + dt_bias.to(compute)).clamp(dt_min, dt_max)
    decay_TH = torch.exp(delta_TH * A.to(compute))
    x_THP = x.to(compute)
    B_THN = B.to(compute).repeat_interleave(per_group, dim=1)
    C_THN = C.to(compute).repeat_interleave(per_group, dim=1)
    input_THP, skip_THP = delta_TH[..., None] * x_THP, D.to(compute)[:, None] * x_THP
    y = torch.zeros_like(x)
    next_state = ssm_state.clone()
    starts = query_start.tolist()
    for b, (start, end) in enumerate(pairwise(starts)):
        if start == end:
            continue
        row = int(slot[b])
        h_HPN = ssm_state[row].to(compute, copy=True)
        if context_len[b] == 0:
            h_HPN.zero_()
        for t in range(start, end):
            h_HPN.mul_(decay_TH[t, :, None, None]).addcmul_(input_THP[t, :, :, None], B_THN[t, :, None, :])
            y[t] = (h_HPN @ C_THN[t, :, :, None])[..., 0] + skip_THP[t]
        next_state[row] = h_HPN.to(ssm_state.dtype)
    return y, next_state
