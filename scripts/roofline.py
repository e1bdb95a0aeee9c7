"""The minimum work of each op, and the measured bandwidth and peak rates of this GPU.

A count is a lower bound: each input is read once, each output is written once, and shared reads hit L2.
Legend: T tokens, B sequences, C channels, K taps, H heads, P head dim, G groups, N state size, L expert input size,
I inner size, R experts, k experts per token, Q query heads, V key-value heads, D head dim.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

SSD_CHUNK = 128
"""Tokens per chunk in the count of the scan's products: the model's `chunk_size`."""


@dataclass(frozen=True)
class Count:
    """The minimum work of one call: operations (a multiply-add is two) and bytes read and written."""

    flops: float
    num_bytes: float

    def bound(self, peak: float, bandwidth: float) -> float:
        """The minimum time in seconds, with these rates in operations and bytes per second."""
        return max(self.flops / peak, self.num_bytes / bandwidth)


def conv(lengths: Sequence[int], contexts: Sequence[int], C: int, K: int, x: int) -> Count:
    """The causal convolution; `x` is the size of an activation in bytes."""
    T = sum(lengths)
    read = sum(context > 0 for context in contexts) * C * (K - 1) * x
    written = sum(length > 0 for length in lengths) * C * (K - 1) * x
    return Count(2 * T * C * K, 2 * T * C * x + C * (K + 1) * x + read + written)


def scan(
    lengths: Sequence[int], contexts: Sequence[int], H: int, P: int, G: int, N: int, x: int, state: int
) -> Count:
    """The selective scan: chunked products for sequences of several tokens, one step for sequences of one.

    The products of a chunk are C Bᵀ per group, and (L ∘ C Bᵀ) X, Bᵀ X and C h per head.
    """
    T = sum(lengths)
    chunked = sum(length for length in lengths if length > 1)
    stepped = T - chunked
    flops = chunked * (2 * G * SSD_CHUNK * N + 2 * H * SSD_CHUNK * P + 4 * H * P * N)
    flops += stepped * H * P * N * 6
    states = sum(length > 0 for length in lengths)
    states += sum(context > 0 and length > 0 for length, context in zip(lengths, contexts, strict=True))
    return Count(flops, T * (2 * H * P + 2 * G * N + H) * x + states * H * P * N * state)


def experts(T: int, distinct: int, L: int, I: int, k: int, x: int, weight: int) -> Count:  # noqa: E741
    """The experts of T tokens, which choose `distinct` experts; a hidden activation has the size of a weight.

    Rows are gathered from L2, the hidden activation is written and read once, and the combine is fused.
    """
    rows = T * k
    moved = distinct * 2 * L * I * weight + T * L * weight + 2 * rows * I * weight + T * L * x
    return Count(rows * 4 * L * I, moved)


def attention(
    lengths: Sequence[int], contexts: Sequence[int], Q: int, V: int, D: int, x: int, cache: int
) -> Count:
    """Causal attention over the context and the sequence's tokens, which are appended to the cache."""
    T = sum(lengths)
    pairs = sum(
        length * context + length * (length + 1) / 2
        for length, context in zip(lengths, contexts, strict=True)
    )
    past = sum(context for length, context in zip(lengths, contexts, strict=True) if length)
    return Count(4 * Q * D * pairs, T * (2 * Q + 2 * V) * D * x + 2 * (past + T) * V * D * cache)


@dataclass(frozen=True)
class Rates:
    """The measured rates of this device: bytes per second, and operations per second by dtype."""

    bandwidth: float
    flops: dict[str, float]
    notes: tuple[str, ...] = ()

    def peak(self, dtype: str) -> float:
        """Operations per second of tensor cores; infinite for FP32, which is not measured."""
        return self.flops.get(dtype, float("inf"))


def median_seconds(call: Callable[[], object], repeats: int, device: torch.device) -> float:
    """The median time of a call after three warm-up calls, by CUDA events or, on a CPU, by the clock."""
    for _ in range(3):
        call()
    return statistics.median(_timed(call, device) for _ in range(repeats))


def _timed(call: Callable[[], object], device: torch.device) -> float:
    if device.type != "cuda":
        started = time.perf_counter()
        call()
        return time.perf_counter() - started
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
    start.record()
    call()
    end.record()
    end.synchronize()
    return float(start.elapsed_time(end)) / 1e3


def measure_rates(device: torch.device) -> Rates:
    """The rates of a 2 GiB copy and of 8192³ matrix products; tiny ones on a CPU, which are meaningless."""
    cuda = device.type == "cuda"
    size, elements = (8192, 2**30) if cuda else (64, 2**16)
    source = torch.empty(elements, dtype=torch.float16, device=device).zero_()
    target = torch.empty_like(source)
    repeats = 20 if cuda else 3
    bandwidth = 2 * source.nbytes / median_seconds(lambda: target.copy_(source), repeats, device)

    a, b = (torch.randn(size, size, device=device).bfloat16() for _ in range(2))
    work = 2 * size**3
    half = work / median_seconds(lambda: a @ b, repeats, device)
    flops = {"float16": half, "bfloat16": half}
    if not cuda or torch.cuda.get_device_capability(device) < (8, 9):
        return Rates(bandwidth, flops, ("no FP8 rate: the device has no FP8 tensor cores",))
    one = torch.ones((), device=device)
    a_fp8, b_fp8 = a.to(torch.float8_e4m3fn), b.to(torch.float8_e4m3fn).T

    def product() -> torch.Tensor:
        return torch._scaled_mm(a_fp8, b_fp8, one, one, out_dtype=torch.bfloat16, use_fast_accum=True)

    flops["float8_e4m3fn"] = work / median_seconds(product, repeats, device)
    return Rates(bandwidth, flops)
