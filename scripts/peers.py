"""Other projects' kernels for the same work, which gpu_bench times on the same inputs in the same run.

A peer that is not installed or cannot run raises PeerMissing with the reason. Inputs that a peer needs in another
layout than our pools and pages are converted before it is timed.
"""

from __future__ import annotations

import importlib
import importlib.util
import sys
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from types import ModuleType

import torch
from op_cases import FP8, Case
from torch import Tensor

Call = Callable[[], Tensor]
"""Does the work once and returns the op's first output."""

Prepare = Callable[[Case, dict[str, Tensor], tuple[Tensor, ...]], Call]
"""Takes a case, its inputs by name and our outputs, and returns the peer's call."""


class PeerMissing(Exception):  # noqa: N818 - not an error in the program
    """A peer cannot be timed; the message is one line."""


@dataclass(frozen=True)
class Peer:
    """Another implementation of a case."""

    name: str
    prepare: Prepare


def mamba_kernels(module: str) -> ModuleType:
    """A module of mamba_ssm's Triton kernels, without importing the package, which needs compiled extensions."""
    if "mamba_ssm" not in sys.modules:
        spec = importlib.util.find_spec("mamba_ssm")
        if spec is None:
            raise PeerMissing("mamba_ssm is not installed: pip install mamba_ssm einops")
        package = ModuleType("mamba_ssm")
        package.__path__ = list(spec.submodule_search_locations or ())
        sys.modules["mamba_ssm"] = package
    try:
        return importlib.import_module(f"mamba_ssm.ops.triton.{module}")
    except ImportError as error:
        raise PeerMissing(f"mamba_ssm does not import: {error}") from None


def chunk_scan(chunk_size: int) -> Prepare:
    """mamba_ssm's chunked scan of one sequence, with the final state, in chunks of this many tokens."""

    def prepare(case: Case, inputs: dict[str, Tensor], _: tuple[Tensor, ...]) -> Call:
        scan = mamba_kernels("ssd_combined").mamba_chunk_scan_combined
        slot = inputs["slot"].long()
        state = inputs["ssm_state"][slot].float() if case.step.contexts[0] else None
        x, dt, B, C = (inputs[name][None] for name in ("x", "dt", "B", "C"))
        limits = tuple(case.attributes().values())

        def call() -> Tensor:
            y, _ = scan(
                *(x, dt, inputs["A"], B, C, chunk_size),
                D=inputs["D"],
                dt_bias=inputs["dt_bias"],
                initial_states=state,
                dt_softplus=True,
                dt_limit=limits,
                return_final_states=True,
            )
            return y[0]  # type: ignore[no-any-return]

        return call

    return prepare


def state_update(_: Case, inputs: dict[str, Tensor], outputs: tuple[Tensor, ...]) -> Call:
    """mamba_ssm's one-step update of states in a pool, in place."""
    update = mamba_kernels("selective_state_update").selective_state_update
    H, P, N = inputs["ssm_state"].shape[1:]
    state = inputs["ssm_state"].clone()
    # It requires strides of 0 for values that are equal in a head.
    dt = inputs["dt"][:, :, None].expand(-1, H, P)
    A = inputs["A"][:, None, None].expand(H, P, N)
    D, dt_bias = (inputs[name][:, None].expand(H, P) for name in ("D", "dt_bias"))

    def call() -> Tensor:
        return update(  # type: ignore[no-any-return]
            *(state, inputs["x"], dt, A, inputs["B"], inputs["C"], D),
            dt_bias=dt_bias,
            dt_softplus=True,
            state_batch_indices=inputs["slot"],
        )

    return call


def experts(
    inputs: dict[str, Tensor], top_k: int, routed_scaling_factor: float, product: Callable[..., Tensor]
) -> Tensor:
    """Routing, permutation, two grouped products and the combine, in plain torch."""
    x = inputs["x"]
    scores = torch.sigmoid(inputs["router_logits"])
    chosen = torch.topk(scores + inputs["correction_bias"], top_k).indices
    weights = scores.gather(1, chosen)
    weights = weights / (weights.sum(1, keepdim=True) + 1e-20) * routed_scaling_factor
    sorted_experts, order = chosen.flatten().sort(stable=True)
    every = torch.arange(scores.shape[1], device=x.device)
    offsets = torch.searchsorted(sorted_experts, every, right=True).int()

    rows = x[order // top_k]
    scales = (inputs["up_scale"], inputs["input_scale"])
    hidden = product(rows, inputs["up"].transpose(1, 2), *scales, sorted_experts, offsets)
    hidden = torch.relu(hidden).square()
    scales = (inputs["down_scale"], inputs["hidden_scale"])
    parts = product(hidden, inputs["down"].transpose(1, 2), *scales, sorted_experts, offsets)
    back = torch.empty_like(order)
    back[order] = torch.arange(len(order), device=x.device)
    parts = parts[back].view(*chosen.shape, -1)
    return (parts * weights[:, :, None]).sum(1).to(x.dtype)


@cache
def compiled_experts() -> Callable[..., Tensor]:
    """`experts` with torch.compile, specialized for each shape."""
    return torch.compile(experts, dynamic=False)


def grouped_experts(compiled: bool) -> Prepare:
    """torch's grouped products, optionally with torch.compile for the rest."""

    def prepare(case: Case, inputs: dict[str, Tensor], _: tuple[Tensor, ...]) -> Call:
        product = scaled_product if case.dtype["W"] == FP8 else plain_product
        work = compiled_experts() if compiled else experts
        return lambda: work(inputs, case.model.top_k, case.model.routed_scaling_factor, product)

    return prepare


def plain_product(
    rows: Tensor, weight: Tensor, scale: Tensor, _: Tensor, experts: Tensor, offsets: Tensor
) -> Tensor:
    """Each row times its expert's weight, with one scale per column."""
    return torch._grouped_mm(rows, weight, offs=offsets) * scale.to(rows.dtype)[experts]


def scaled_product(
    rows: Tensor, weight: Tensor, scale: Tensor, input_scale: Tensor, _: Tensor, offsets: Tensor
) -> Tensor:
    """Each row in E4M3 times its expert's weight, with one scale per row and one per column."""
    quantized = (rows.float() / input_scale).clamp(-448, 448).to(torch.float8_e4m3fn)
    return torch._scaled_grouped_mm(
        *(quantized, weight, input_scale.expand(len(rows)).contiguous(), scale),
        offs=offsets,
        out_dtype=torch.bfloat16,
        use_fast_accum=True,
    )


def dense_attention(case: Case, inputs: dict[str, Tensor], outputs: tuple[Tensor, ...]) -> Call:
    """torch's attention over contiguous keys and values in q's dtype, without append and without pages."""
    step, model = case.step, case.model
    total = step.lengths[0] + step.contexts[0]
    pages = inputs["page_table"].long()
    scales = torch.stack([inputs["k_scale"], inputs["v_scale"]]) if case.dtype["CACHE"] == FP8 else None
    cache = outputs[1][pages].transpose(1, 2).transpose(2, 3).flatten(3, 4)[:, :, :, :total]
    keys, values = cache.to(inputs["q"].dtype).unbind(1)
    if scales is not None:
        keys, values = keys * scales[0].to(keys.dtype), values * scales[1].to(values.dtype)
    keys, values = keys.contiguous(), values.contiguous()
    q = inputs["q"].view(len(step.lengths), -1, model.query_heads, model.attention_dim)
    q = q.transpose(1, 2).contiguous()
    causal = step.lengths[0] > 1
    scale = model.attention_dim**-0.5

    def call() -> Tensor:
        o = torch.nn.functional.scaled_dot_product_attention(
            q, keys, values, is_causal=causal, scale=scale, enable_gqa=True
        )
        return o.transpose(1, 2).flatten(0, 1)

    return call


def peers(case: Case, interpret: bool) -> list[Peer]:
    """The peers of a case; on a CPU, those that need a GPU raise PeerMissing."""
    decode = set(case.step.lengths) == {1}
    if case.op == "selective_scan":
        listed = (
            [Peer("mamba_ssm update", state_update)]
            if decode
            else [Peer(f"mamba_ssm scan {size}", chunk_scan(size)) for size in (128, 256)]
        )
        return [Peer(peer.name, needs_gpu) for peer in listed] if interpret else listed
    if case.op == "moe_dispatch":
        name = "torch._scaled_grouped_mm" if case.dtype["W"] == FP8 else "torch._grouped_mm"
        if interpret and case.dtype["W"] == FP8:
            return [Peer(name, needs_gpu)]
        return [Peer(f"{name}, compiled" if not interpret else name, grouped_experts(not interpret))]
    if case.op == "paged_attention":
        return [Peer("torch SDPA", dense_attention)]
    return []


def needs_gpu(*_: object) -> Call:
    """The `prepare` of a peer that does not run on a CPU."""
    raise PeerMissing("it needs a GPU")
