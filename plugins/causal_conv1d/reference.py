"""The reference that defines correct results, in plain PyTorch.

Legend: T tokens, B sequences, C channels, K taps, S slots.
"""

from itertools import pairwise

import torch
from torch import Tensor


def reference(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    conv_state: Tensor,
    query_start: Tensor,
    context_len: Tensor,
    slot: Tensor,
) -> tuple[Tensor, Tensor]:
    """y [T, C] and the next pool [S, C, K-1]; y of padding tokens is 0, and an empty sequence's state does not change.

    y[t] = silu(bias + Σ_k weight[:, k] · x[t − (K−1) + k]), where inputs before a sequence's first token come from
    its state, or are zero if its context is empty (the convolution of Gu and Dao 2023, arXiv 2312.00752, section 3.4).
    """
    taps = weight.shape[1]
    y = torch.zeros_like(x)
    next_state = conv_state.clone()
    starts = query_start.tolist()
    for b, (start, end) in enumerate(pairwise(starts)):
        if start == end:
            continue
        row = int(slot[b])
        history_CK = conv_state[row] if context_len[b] > 0 else torch.zeros_like(conv_state[row])
        inputs_CL = torch.cat([history_CK, x[start:end].T], dim=1)
        windows_CLK = inputs_CL.unfold(1, taps, 1)
        sums_CL = bias.float()[:, None] + (windows_CLK.float() * weight.float()[:, None, :]).sum(-1)
        y[start:end] = torch.nn.functional.silu(sums_CL).T.to(x.dtype)
        next_state[row] = inputs_CL[:, inputs_CL.shape[1] - (taps - 1) :]
    return y, next_state
