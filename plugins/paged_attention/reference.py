"""The reference that defines correct results, in plain PyTorch.

Legend: T tokens, B sequences, Q query heads, V key-value heads, D head dim, K pages, M pages of a sequence, L keys.
"""

from itertools import pairwise

import torch
from torch import Tensor

from nemotrt.plugins.e4m3 import FP8, to_e4m3


def reference(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    kv_cache: Tensor,
    k_scale: Tensor,
    v_scale: Tensor,
    query_start: Tensor,
    context_len: Tensor,
    page_table: Tensor,
    *,
    scale: float,
) -> tuple[Tensor, Tensor]:
    """o [T, Q, D] and the next cache [K, 2, V, page, D]; o of padding tokens is 0.

    Token i of a sequence attends to the context and to the sequence's tokens up to i: o = softmax(scale · q kᵀ) v,
    with query head j and key-value head j // (Q / V). Position p is stored in row p % page of the sequence's page
    p // page. An FP8 cache stores k / k_scale and v / v_scale; other caches ignore the scales.
    """
    compute = torch.promote_types(q.dtype, torch.float32)
    if kv_cache.dtype != FP8:
        k_scale, v_scale = torch.ones_like(k_scale), torch.ones_like(v_scale)
    page_size, per_kv = kv_cache.shape[3], q.shape[1] // k.shape[1]
    o = torch.zeros_like(q)
    cache = kv_cache.clone()
    starts = query_start.tolist()
    for b, (start, end) in enumerate(pairwise(starts)):
        if start == end:
            continue
        context, total = int(context_len[b]), int(context_len[b]) + end - start
        positions = torch.arange(context, total, device=q.device)
        pages, rows = page_table[b].long()[positions // page_size], positions % page_size
        cache[pages, 0, :, rows] = _stored(k[start:end], k_scale, cache.dtype)
        cache[pages, 1, :, rows] = _stored(v[start:end], v_scale, cache.dtype)

        used = page_table[b].long()[: (total + page_size - 1) // page_size]
        past_2VLD = cache[used].to(compute).permute(1, 2, 0, 3, 4).flatten(2, 3)[:, :, :total]
        past_2VLD = past_2VLD * torch.stack([k_scale, v_scale]).to(compute).view(2, 1, 1, 1)
        keys_QLD, values_QLD = past_2VLD.repeat_interleave(per_kv, dim=1)
        scores_QTL = (q[start:end].to(compute).transpose(0, 1) @ keys_QLD.transpose(1, 2)).mul_(scale)
        future_TL = torch.arange(total, device=q.device) > positions[:, None]
        probabilities_QTL = scores_QTL.masked_fill_(future_TL, -torch.inf).softmax(-1)
        o[start:end] = (probabilities_QTL @ values_QLD).transpose(0, 1).to(q.dtype)
    return o, cache


def _stored(values: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
    return to_e4m3(values, scale) if dtype == FP8 else values.to(dtype)
