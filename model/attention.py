"""Grouped-query attention without position encoding.

Legend: T tokens, D hidden size, Q query heads, V key-value heads, H head dim.
"""

from functools import partial

import torch
from torch import Tensor, nn

import nemotrt.plugins.torch_op  # noqa: F401  registers torch.ops.nemo
from nemotrt.model.config import ModelConfig
from nemotrt.model.step import Step


class AttentionMixer(nn.Module):
    """Causal attention over a paged cache; scores are scaled by head_dim^−½.

    An FP8 cache stores k / k_scale and v / v_scale (FP32, 1.0 if not calibrated). Other caches ignore the scales.
    """

    def __init__(self, config: ModelConfig, *, dtype: torch.dtype) -> None:
        super().__init__()
        hidden, head_dim, biased = config.hidden_size, config.head_dim, config.attention_bias
        self.query_shape = (config.num_attention_heads, head_dim)
        self.kv_shape = (config.num_key_value_heads, head_dim)
        self.scale = head_dim**-0.5
        query_size, kv_size = config.num_attention_heads * head_dim, config.num_key_value_heads * head_dim
        linear = partial(nn.Linear, bias=biased, dtype=dtype)
        self.q_proj = linear(hidden, query_size)
        self.k_proj = linear(hidden, kv_size)
        self.v_proj = linear(hidden, kv_size)
        self.o_proj = linear(query_size, hidden)
        self.k_scale = nn.Parameter(torch.ones(1, dtype=torch.float32))
        self.v_scale = nn.Parameter(torch.ones(1, dtype=torch.float32))

    def forward(self, x_TD: Tensor, step: Step, kv_cache: Tensor) -> tuple[Tensor, Tensor]:
        """Returns the mixed tokens [T, D] and the layer's cache after this step."""
        o_TQH, next_kv_cache = torch.ops.nemo.paged_attention(
            self.q_proj(x_TD).unflatten(1, self.query_shape),
            self.k_proj(x_TD).unflatten(1, self.kv_shape),
            self.v_proj(x_TD).unflatten(1, self.kv_shape),
            kv_cache,
            self.k_scale,
            self.v_scale,
            step.query_start,
            step.context_len,
            step.page_table,
            scale=self.scale,
        )
        return self.o_proj(o_TQH.flatten(1)), next_kv_cache
