# mypy: disable-error-code="no-untyped-def,untyped-decorator"
# Python's types cannot express the types of a jit function's parameters.
"""The op's Triton kernels. Legend: T tokens, B sequences, C channels, TAPS taps, S slots.

- `conv_sequences`: a program owns one sequence and one block of channels. It processes the sequence's first
  `walk` tokens with the window in registers, and then stores the last inputs in the pool. If T ≤ B, it processes
  all tokens.
- `conv_tokens`: a program owns a block of packed tokens of any sequences, and a block of channels. It writes the
  tokens whose window is within this step, and zeroes padding. If T > B, it processes most tokens, and
  conv_sequences with walk = TAPS − 1 those that need their sequence's history.

Only conv_sequences uses the pool, and each value is read and then written by one program, so that the pool can be
updated in place. No output token is written by both launches, so that their order does not matter.
Sums are FP32; inputs are stored in the pool without conversion.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
import triton
import triton.language as tl

from nemotrt.plugins.causal_conv1d import FAMILY_TAPS, SPEC, supports
from nemotrt.plugins.contract import DType
from nemotrt.plugins.spec import FLOATS
from nemotrt.plugins.variant import Launch, Variant, check_sm, device_sm

BLOCKS: dict[str, dict[str, int]] = {
    "conv_sequences": {
        "BLOCK_C": 128
    },  # one channel per thread: a wider block would move the window between threads
    "conv_tokens": {"BLOCK_T": 64, "BLOCK_C": 128},
}
"""The block sizes of each kernel, which are the same on every SM, since no shared memory is used."""

WARPS = {"conv_sequences": 4, "conv_tokens": 8}


@triton.jit
def silu(value):
    """value · sigmoid(value) in FP32."""
    return value / (1.0 + tl.exp(-value))


@triton.jit
def tap_weights(weight, c, inside, TAPS: tl.constexpr):
    """The FP32 weights of the taps at lag 0, 1, 2 and 3; a missing tap repeats another one."""
    # A channel's taps are adjacent, so that one load reads 4 or 2 of them.
    if TAPS == 4:
        taps = tl.load(weight + c[:, None] * 4 + tl.arange(0, 4)[None, :], mask=inside[:, None], other=0.0)
        even, odd = tl.split(tl.reshape(taps.to(tl.float32), [c.shape[0], 2, 2]))
        oldest, newest = tl.split(even)
        middle, now = tl.split(odd)
    elif TAPS == 2:
        taps = tl.load(weight + c[:, None] * 2 + tl.arange(0, 2)[None, :], mask=inside[:, None], other=0.0)
        newest, now = tl.split(taps.to(tl.float32))
        middle, oldest = newest, newest
    else:
        now = tl.load(weight + c * TAPS + 2, mask=inside, other=0.0).to(tl.float32)
        newest = tl.load(weight + c * TAPS + 1, mask=inside, other=0.0).to(tl.float32)
        middle = tl.load(weight + c * TAPS, mask=inside, other=0.0).to(tl.float32)
        oldest = middle
    return now, newest, middle, oldest


@triton.jit
def conv_sequences(
    x,
    weight,
    bias,
    conv_state,
    query_start,
    context_len,
    slot,
    y,
    T,
    B,
    C,
    walk,
    TAPS: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """Grid (channel blocks, B, 1): the first `walk` tokens of sequence b, its history, padding row b."""
    b = tl.program_id(1)
    c = tl.program_id(0) * BLOCK_C + tl.arange(0, BLOCK_C)
    inside = c < C
    start = tl.load(query_start + b)
    end = tl.load(query_start + b + 1)
    if (b < T) & (b >= tl.load(query_start + B)):  # if T ≤ B, every padding row has a program
        tl.store(y + b.to(tl.int64) * C + c, tl.zeros([BLOCK_C], y.dtype.element_ty), mask=inside)
    if start < end:
        state = conv_state + (tl.load(slot + b).to(tl.int64) * C + c) * (TAPS - 1)
        continued = inside & (tl.load(context_len + b) > 0)
        newest = tl.load(state + TAPS - 2, mask=continued, other=0.0)
        weight_now, weight_newest, weight_middle, weight_oldest = tap_weights(weight, c, inside, TAPS)
        if TAPS >= 3:
            middle = tl.load(state + TAPS - 3, mask=continued, other=0.0)
        if TAPS >= 4:
            oldest = tl.load(state + TAPS - 4, mask=continued, other=0.0)
        offset = tl.load(bias + c, mask=inside, other=0.0).to(tl.float32)

        here = start.to(tl.int64) * C + c
        walk_end = tl.minimum(end, start + walk)
        for _ in range(start, walk_end):
            now = tl.load(x + here, mask=inside, other=0.0)
            total = offset + weight_now * now.to(tl.float32) + weight_newest * newest.to(tl.float32)
            if TAPS >= 3:
                total += weight_middle * middle.to(tl.float32)
            if TAPS >= 4:
                total += weight_oldest * oldest.to(tl.float32)
            tl.store(y + here, silu(total).to(y.dtype.element_ty), mask=inside)
            if TAPS >= 4:
                oldest = middle
            if TAPS >= 3:
                middle = newest
            newest = now
            here += C

        if walk_end < end:  # walk ≥ TAPS − 1, so the last inputs are all from this step
            last = x + end.to(tl.int64) * C + c
            newest = tl.load(last - C, mask=inside, other=0.0)
            if TAPS >= 3:
                middle = tl.load(last - 2 * C, mask=inside, other=0.0)
            if TAPS >= 4:
                oldest = tl.load(last - 3 * C, mask=inside, other=0.0)
        tl.debug_barrier()  # all warps must load before any stores: two of them may hold the same channel
        tl.store(state + TAPS - 2, newest, mask=inside)
        if TAPS >= 3:
            tl.store(state + TAPS - 3, middle, mask=inside)
        if TAPS >= 4:
            tl.store(state + TAPS - 4, oldest, mask=inside)


@triton.jit
def sequence_start(query_start, token, B):
    """The start of each token's sequence; a padding token counts as one of the last sequence."""
    low = token * 0
    high = low + B
    width = B
    while width > 1:
        middle = (low + high) // 2
        reached = tl.load(query_start + middle) <= token
        low = tl.where(reached, middle, low)
        high = tl.where(reached, high, middle)
        width = (width + 1) // 2
    return tl.load(query_start + low)


@triton.jit
def conv_tokens(
    x,
    weight,
    bias,
    query_start,
    y,
    T,
    B,
    C,
    TAPS: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """Grid (channel blocks, token blocks, 1): y of tokens that need no history, and 0 for padding."""
    t = tl.program_id(1) * BLOCK_T + tl.arange(0, BLOCK_T)
    c = tl.program_id(0) * BLOCK_C + tl.arange(0, BLOCK_C)
    inside = c < C
    own = (t < T)[:, None] & inside[None, :]
    here = t.to(tl.int64)[:, None] * C + c[None, :]
    # Load before searching for the sequence, so that the search overlaps with the loads.
    now = tl.load(x + here, mask=own, other=0.0)
    newest = tl.load(x + here - C, mask=own & (t >= 1)[:, None], other=0.0)
    if TAPS >= 3:
        middle = tl.load(x + here - 2 * C, mask=own & (t >= 2)[:, None], other=0.0)
    if TAPS >= 4:
        oldest = tl.load(x + here - 3 * C, mask=own & (t >= 3)[:, None], other=0.0)
    weight_now, weight_newest, weight_middle, weight_oldest = tap_weights(weight, c, inside, TAPS)
    offset = tl.load(bias + c, mask=inside, other=0.0).to(tl.float32)

    padding = t >= tl.load(query_start + B)
    whole = t - sequence_start(query_start, t, B) >= TAPS - 1  # its window is within this step

    total = offset[None, :] + weight_now[None, :] * now.to(tl.float32)
    total += weight_newest[None, :] * newest.to(tl.float32)
    if TAPS >= 3:
        total += weight_middle[None, :] * middle.to(tl.float32)
    if TAPS >= 4:
        total += weight_oldest[None, :] * oldest.to(tl.float32)
    result = tl.where(padding[:, None], 0.0, silu(total))
    tl.store(y + here, result.to(y.dtype.element_ty), mask=own & (padding | whole)[:, None])


KERNELS = {"conv_sequences": conv_sequences, "conv_tokens": conv_tokens}

POINTERS = {
    "conv_sequences": ("x", "weight", "bias", "conv_state", "query_start", "context_len", "slot", "y"),
    "conv_tokens": ("x", "weight", "bias", "query_start", "y"),
}
"""Pointers of each kernel, in declaration order, by the SPEC's names; `conv_state` is also the output pool."""

INTEGERS = {"conv_sequences": ("T", "B", "C", "walk"), "conv_tokens": ("T", "B", "C")}
"""Runtime integers of each kernel, in declaration order, after its pointers."""


def variant(kernel: str, dtype: str, taps: int) -> Variant:
    """The variant of a kernel for a dtype as the SPEC writes it."""
    types = {tensor.name: tensor.dtype for tensor in SPEC.inputs} | {"y": "X"}
    pointers = {
        name: f"*{DType(dtype if types[name] == 'X' else types[name]).triton}" for name in POINTERS[kernel]
    }
    return Variant(
        kernel=kernel,
        signature=pointers | dict.fromkeys(INTEGERS[kernel], "i32"),
        constants={"TAPS": taps, **BLOCKS[kernel]},
        num_warps=WARPS[kernel],
        num_stages=1,  # no loop to pipeline
        aligned=(*pointers, "C"),
    )


def variants(sm: int) -> Iterator[Variant]:
    """Every variant of the op on an SM; raises ValueError if the SM is not in `SMS`."""
    check_sm(SPEC.name, sm)
    for kernel in KERNELS:
        for dtype in FLOATS:
            for taps in FAMILY_TAPS:
                yield variant(kernel, dtype, taps)


def launches(sizes: dict[str, int], dtypes: dict[str, str], sm: int) -> list[Launch]:
    """The launches for these sizes (the SPEC's axes) and dtypes, in any order; no workspace."""
    supports(sizes, dtypes, sm)
    T, B, C, taps = (sizes[axis] for axis in ("T", "B", "C", "K"))
    walk = T if T <= B else taps - 1
    grids = {"conv_sequences": (triton.cdiv(C, BLOCKS["conv_sequences"]["BLOCK_C"]), B, 1)}
    if T > B:
        blocks = BLOCKS["conv_tokens"]
        grids["conv_tokens"] = (triton.cdiv(C, blocks["BLOCK_C"]), triton.cdiv(T, blocks["BLOCK_T"]), 1)
    integers = {"T": T, "B": B, "C": C, "walk": walk}
    return [
        Launch(variant(name, dtypes["X"], taps), grid, {key: integers[key] for key in INTEGERS[name]})
        for name, grid in grids.items()
    ]


def run(*tensors: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Run the op like its reference, with the kernels: inputs in SPEC order → y [T, C], next pool [S, C, K-1].

    Runs on the tensors' device, or on a CPU in Triton's interpreter. Raises ValueError as `supports` does.
    """
    sizes = SPEC.sizes([tuple(tensor.shape) for tensor in tensors])
    buffers = {spec.name: tensor.contiguous() for spec, tensor in zip(SPEC.inputs, tensors, strict=True)}
    buffers["conv_state"] = buffers["conv_state"].clone()
    buffers["y"] = torch.empty_like(buffers["x"])
    dtypes = {"X": str(buffers["x"].dtype).removeprefix("torch.")}
    execute(launches(sizes, dtypes, device_sm(tensors[0].device)), buffers)
    return buffers["y"], buffers["conv_state"]


def execute(plan: list[Launch], buffers: dict[str, torch.Tensor]) -> None:
    """Launch a plan on contiguous tensors by pointer name: writes y [T, C], updates conv_state in place."""
    for launch in plan:
        launch.start(KERNELS[launch.variant.kernel], buffers)
