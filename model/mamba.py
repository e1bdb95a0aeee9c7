"""The Mamba-2 mixer.

Legend: T tokens, D hidden size, I inner size, C conv channels, H heads, P head dim, G groups, S group size, N state.
"""

from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import nemotrt.plugins.torch_op  # noqa: F401  registers torch.ops.nemo
from nemotrt.model.config import ModelConfig
from nemotrt.model.step import Step


class ConvWeights(nn.Module):
    """The weight [C, taps] and bias [C] of a depthwise convolution; the bias is 0 if the checkpoint has none."""

    def __init__(self, channels: int, taps: int, *, dtype: torch.dtype) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(channels, taps, dtype=dtype))
        self.bias = nn.Parameter(torch.zeros(channels, dtype=dtype))


class GatedGroupRMSNorm(nn.Module):
    """RMS norm over each group of y · silu(z), computed in FP32.

    The gate is applied before the norm; mamba_ssm calls this `norm_before_gate=False`.
    """

    def __init__(self, size: int, num_groups: int, eps: float) -> None:
        super().__init__()
        self.eps = eps
        self.num_groups = num_groups
        self.group_size = size // num_groups
        self.weight = nn.Parameter(torch.ones(size, dtype=torch.float32))

    def forward(self, y_TI: Tensor, z_TI: Tensor) -> Tensor:
        """y and its gate z, both [T, I], → [T, I] in y's dtype."""
        gated_TI = y_TI.float() * F.silu(z_TI.float())
        gated_TGS = torch.unflatten(gated_TI, 1, (self.num_groups, self.group_size))
        normed_TI = F.rms_norm(gated_TGS, (self.group_size,), eps=self.eps).flatten(1)
        return (normed_TI * self.weight).to(y_TI.dtype)


class MambaMixer(nn.Module):
    """in_proj → causal convolution → selective scan → gated group norm → out_proj.

    Dao and Gu 2024, arXiv 2405.21060, section 7. A (= −exp(A_log)), D and dt_bias are always FP32.
    """

    def __init__(self, config: ModelConfig, *, dtype: torch.dtype) -> None:
        super().__init__()
        heads, inner = config.mamba_num_heads, config.mamba_inner_size
        groups, state = config.n_groups, config.ssm_state_size
        self.dt_min, self.dt_max = config.time_step_limit
        self.head_shape, self.group_shape = (heads, config.mamba_head_dim), (groups, state)
        self.zxbcdt_sizes = [inner, config.conv_channels, heads]
        self.xbc_sizes = [inner, groups * state, groups * state]
        linear = partial(nn.Linear, bias=config.use_bias, dtype=dtype)
        self.in_proj = linear(config.hidden_size, sum(self.zxbcdt_sizes))
        self.conv1d = ConvWeights(config.conv_channels, config.conv_kernel, dtype=dtype)
        self.A = nn.Parameter(torch.zeros(heads, dtype=torch.float32))
        self.D = nn.Parameter(torch.zeros(heads, dtype=torch.float32))
        self.dt_bias = nn.Parameter(torch.zeros(heads, dtype=torch.float32))
        self.norm = GatedGroupRMSNorm(inner, groups, config.norm_eps)
        self.out_proj = linear(inner, config.hidden_size)

    def forward(
        self, x_TD: Tensor, step: Step, conv_state: Tensor, ssm_state: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Returns the mixed tokens [T, D] and the layer's two pools after this step."""
        z_TI, xbc_TC, dt_TH = self.in_proj(x_TD).split(self.zxbcdt_sizes, dim=1)
        xbc_TC, next_conv_state = torch.ops.nemo.causal_conv1d(
            xbc_TC,
            self.conv1d.weight,
            self.conv1d.bias,
            conv_state,
            step.query_start,
            step.context_len,
            step.slot,
        )
        x_TI, b_TGN, c_TGN = xbc_TC.split(self.xbc_sizes, dim=1)
        y_THP, next_ssm_state = torch.ops.nemo.selective_scan(
            x_TI.unflatten(1, self.head_shape),
            dt_TH,
            self.A,
            b_TGN.unflatten(1, self.group_shape),
            c_TGN.unflatten(1, self.group_shape),
            self.D,
            self.dt_bias,
            ssm_state,
            step.query_start,
            step.context_len,
            step.slot,
            dt_min=self.dt_min,
            dt_max=self.dt_max,
        )
        return self.out_proj(self.norm(y_THP.flatten(1), z_TI)), next_conv_state, next_ssm_state
