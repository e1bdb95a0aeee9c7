"""The reference that defines correct results, in plain PyTorch.

Legend: T tokens, L expert input size, R routed experts, E experts here, I inner size, k experts a token.
"""

import torch
from torch import Tensor

from nemotrt.plugins.e4m3 import FP8, from_e4m3, to_e4m3


def reference(
    x: Tensor,
    router_logits: Tensor,
    correction_bias: Tensor,
    up: Tensor,
    down: Tensor,
    up_scale: Tensor,
    down_scale: Tensor,
    input_scale: Tensor,
    hidden_scale: Tensor,
    *,
    top_k: int,
    num_groups: int,
    topk_group: int,
    norm_topk_prob: int,
    routed_scaling_factor: float,
    first_expert: int,
) -> tuple[Tensor]:
    """y [T, L] = Σ_k w_k · down_k(relu(up_k x)²) over a token's chosen experts, summed in the order of their rank.

    Experts outside [first_expert, first_expert + E) are skipped, since another rank adds them. The hidden activation
    is rounded to x's dtype. With FP8 weights, x and the hidden activation are quantized to E4M3 by their scales.
    Every output of a weight has its own scale.
    """
    compute = torch.promote_types(x.dtype, torch.float32)
    chosen_Tk, weights_Tk = route(
        router_logits,
        correction_bias,
        top_k=top_k,
        num_groups=num_groups,
        topk_group=topk_group,
        norm_topk_prob=norm_topk_prob,
        routed_scaling_factor=routed_scaling_factor,
    )
    is_fp8 = up.dtype == FP8
    parts_TkL = torch.zeros(*chosen_Tk.shape, x.shape[1], dtype=compute, device=x.device)
    for e in range(up.shape[0]):
        t, k = torch.where(chosen_Tk == first_expert + e)
        if not len(t):
            continue
        rows = _quantized(x[t], input_scale) if is_fp8 else x[t]
        hidden = (rows.to(compute) @ _wide(up[e], compute).T) * up_scale[e]
        hidden = torch.relu(hidden).square().to(x.dtype)
        hidden = _quantized(hidden, hidden_scale) if is_fp8 else hidden
        parts_TkL[t, k] = (hidden.to(compute) @ _wide(down[e], compute).T) * down_scale[e]
    y_TL = torch.zeros(x.shape, dtype=compute, device=x.device)
    for rank in range(top_k):
        y_TL += weights_Tk[:, rank, None].to(compute) * parts_TkL[:, rank]
    return (y_TL.to(x.dtype),)


def route(
    router_logits: Tensor,
    correction_bias: Tensor,
    *,
    top_k: int,
    num_groups: int,
    topk_group: int,
    norm_topk_prob: int,
    routed_scaling_factor: float,
) -> tuple[Tensor, Tensor]:
    """The chosen experts [T, k] int64 in order of rank, and their weights [T, k]; the lower index wins a tie.

    s = sigmoid(logits); choose by s + correction_bias among the topk_group groups whose two best sum highest;
    w = s / (Σ s + 1e-20) · routed_scaling_factor (DeepSeek-V3, arXiv 2412.19437, section 2.1.2).
    """
    scores_TR = torch.sigmoid(router_logits)
    ranked_TR = scores_TR + correction_bias
    if num_groups > 1:
        grouped_TGR = ranked_TR.reshape(len(ranked_TR), num_groups, -1)
        group_score_TG = grouped_TGR.topk(min(2, grouped_TGR.shape[2]), dim=2).values.sum(2)
        kept_TG = _top(group_score_TG, topk_group)
        mask_TG = torch.ones_like(group_score_TG, dtype=torch.bool).scatter(1, kept_TG, False)
        ranked_TR = grouped_TGR.masked_fill(mask_TG[..., None], -torch.inf).flatten(1)
    chosen_Tk = _top(ranked_TR, top_k)
    weights_Tk = scores_TR.gather(1, chosen_Tk)
    if norm_topk_prob:
        weights_Tk = weights_Tk / (weights_Tk.sum(1, keepdim=True) + 1e-20)
    return chosen_Tk, weights_Tk * routed_scaling_factor


def _top(values: Tensor, count: int) -> Tensor:
    return values.sort(dim=1, descending=True, stable=True).indices[:, :count]


def _quantized(values: Tensor, scale: Tensor) -> Tensor:
    return to_e4m3(values, scale).float() * scale


def _wide(weight: Tensor, compute: torch.dtype) -> Tensor:
    return (from_e4m3(weight) if weight.dtype == FP8 else weight).to(compute)
