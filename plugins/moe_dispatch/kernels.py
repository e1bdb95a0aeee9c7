"""The op's Triton kernels: route, permute on the device, two grouped matrix products, ordered combine.

Legend: T tokens, L expert input size, R routed experts, E experts here, I inner size, k experts per token,
C chunks of tokens. A *slot* is one token's choice of one expert, t · k + rank; a *row* is a slot's position after
slots are sorted by expert, then token; a *block* is up to BLOCK_M rows of one expert.

The launches depend only on shapes, and no result depends on the order in which programs run:

1. `route_kernel`: a token's experts and weights, and `ranks` [T, experts], where 0 means "not chosen". With FP8
   weights, `route_and_quantize_kernel` also quantizes x once.
2. `count_kernel` (only for more tokens than one chunk) and `place_kernel`: `slots` [T · k], the slot of each row,
   and `blocks` [3, bound], each block's expert (−1: none), first row and number of rows.
3. `up_kernel` gathers a block's rows of x and writes `hidden` by row; `down_kernel` writes `parts` by slot.
4. `combine_kernel` adds a token's parts in the order of rank.

Blocks have 128 or 64 rows if experts have many rows (prefill), and 16 if they have few (decode). With 16 rows, the
weights are the product's left operand, so that the rows fill the narrow side of a tensor core. A single token needs
no permutation: its slots are its blocks.

Parts are FP32, because the reference rounds only the hidden activation and y, and a part may overflow FP16 even if y
does not. For 8192 tokens of Super, 1.5 GB are written and read, half of which FP16 would save.
"""

# ruff: noqa: E741
# I is the SPEC's name of an expert's inner size.
# mypy: disable-error-code="no-untyped-def, untyped-decorator"
# Python's types cannot express the types of a jit function's parameters.

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from math import prod
from typing import Any

import torch
import triton
import triton.language as tl

from nemotrt.plugins.contract import DType
from nemotrt.plugins.moe_dispatch import FP8, MAX_EXPERTS, MAX_TOP_K, SPEC, supports
from nemotrt.plugins.spec import FLOATS
from nemotrt.plugins.variant import Launch, Variant, check_sm, device_sm, supports_fp8

CHUNK_TOKENS = 128
"""Tokens per `place_kernel` program."""

LEAST = tl.constexpr(-(2**31))
"""Smaller than the key of every number; marks entries that are already chosen or do not exist."""
STEP = tl.constexpr(16)
"""Rows of `ranks` or `counts` that a program loads at a time."""

_SIZES = ("T", "R", "E", "num_chunks", "max_blocks", "block_rows")
_ATTRIBUTES = ("top_k", "num_groups", "topk_group", "norm_topk_prob", "first_expert")
# Otherwise Triton would compile another version if one of these is 1 or a multiple of 16.
_kernel = triton.jit(do_not_specialize=_SIZES + _ATTRIBUTES)


# 1. Routing


@triton.jit
def _key(value):
    """An int32 with the order of the FP32 value; NaN is the largest, as in torch.sort."""
    bits = value.to(tl.int32, bitcast=True)
    return tl.where(value != value, 0x7FFFFFFF, bits ^ ((bits >> 31) & 0x7FFFFFFF))


@triton.jit
def _value(key):
    return (key ^ ((key >> 31) & 0x7FFFFFFF)).to(tl.float32, bitcast=True)


@triton.jit
def _first_best(key, index, SIZE: tl.constexpr):
    """The lowest index of the largest key; a warp reduces integers in one instruction."""
    return tl.min(tl.where(key == tl.max(key, axis=0), index, SIZE - 1), axis=0)


@triton.jit
def _sigmoid(value):
    # exp(−|value|) never overflows, and preserves the order of very negative logits.
    decay = tl.exp(-tl.abs(value))
    return tl.where(value >= 0, 1.0, decay) / (1.0 + decay)


@triton.jit
def _within_kept_groups(key_R, index_R, R, num_groups, topk_group, BLOCK_R: tl.constexpr):
    """The keys, with −inf outside the topk_group best groups; a group's score is the sum of its two best."""
    group_size = R // num_groups
    group_R = index_R // group_size
    score_R = tl.full([BLOCK_R], LEAST, tl.int32)
    for group in range(num_groups):
        member_R = tl.where((group_R == group) & (index_R < R), key_R, LEAST)
        first = _first_best(member_R, index_R, BLOCK_R)
        score = _value(tl.max(member_R, axis=0))
        if group_size > 1:
            score += _value(tl.max(tl.where(index_R == first, LEAST, member_R), axis=0))
        score_R = tl.where((group_R == group) & (index_R < R), _key(score), score_R)
    kept_R = index_R < 0
    for _ in range(topk_group):
        kept = group_R == _first_best(score_R, index_R, BLOCK_R) // group_size
        kept_R = kept_R | kept
        score_R = tl.where(kept, LEAST, score_R)
    return tl.where(kept_R | (index_R >= R), key_R, _key(tl.full([BLOCK_R], float("-inf"), tl.float32)))


@triton.jit
def _route(
    router_logits,
    correction_bias,
    experts,
    weights,
    ranks,
    R,
    E,
    top_k,
    num_groups,
    topk_group,
    norm_topk_prob,
    routed_scaling_factor,
    first_expert,
    BLOCK_R: tl.constexpr,
    BLOCK_TOP_K: tl.constexpr,
):
    token = tl.program_id(0)
    logits = router_logits + token.to(tl.int64) * R
    index_R = tl.arange(0, BLOCK_R)
    there_R = index_R < R
    score_R = _sigmoid(tl.load(logits + index_R, mask=there_R, other=0.0))
    ranked_R = score_R + tl.load(correction_bias + index_R, mask=there_R, other=0.0)
    key_R = tl.where(there_R, _key(ranked_R), LEAST)
    if num_groups > 1:
        key_R = _within_kept_groups(key_R, index_R, R, num_groups, topk_group, BLOCK_R)

    rank_k = tl.arange(0, BLOCK_TOP_K)
    chosen_k = tl.zeros([BLOCK_TOP_K], tl.int32)
    place_R = tl.zeros([BLOCK_R], tl.int32)
    for rank in range(top_k):
        best = _first_best(key_R, index_R, BLOCK_R)
        key_R = tl.where(index_R == best, LEAST, key_R)
        place_R = tl.where(index_R == best, rank + 1, place_R)
        chosen_k = tl.where(rank_k == rank, best, chosen_k)

    valid_k = rank_k < top_k
    weight_k = tl.where(valid_k, _sigmoid(tl.load(logits + chosen_k, mask=valid_k, other=0.0)), 0.0)
    if norm_topk_prob != 0:
        weight_k = weight_k / (tl.sum(weight_k, axis=0) + 1e-20)
    here_k = chosen_k - first_expert
    here_k = tl.where((here_k >= 0) & (here_k < E), here_k, -1)
    slot_k = token * top_k + rank_k
    tl.store(experts + slot_k, here_k, mask=valid_k)
    tl.store(weights + slot_k, weight_k * routed_scaling_factor, mask=valid_k)
    # The columns wrap around, so that every column is written for any first expert.
    here_R = index_R - first_expert
    place_R = tl.where((here_R >= 0) & (here_R < E), place_R, 0)
    tl.store(ranks + token.to(tl.int64) * BLOCK_R + (here_R & (BLOCK_R - 1)), place_R.to(tl.int8))


@_kernel
def route_kernel(
    router_logits,
    correction_bias,
    experts,
    weights,
    ranks,
    R,
    E,
    top_k,
    num_groups,
    topk_group,
    norm_topk_prob,
    routed_scaling_factor,
    first_expert,
    BLOCK_R: tl.constexpr,
    BLOCK_TOP_K: tl.constexpr,
):
    """Experts [T, k], −1 if not here; weights [T, k]; ranks [T, BLOCK_R], rank + 1, or 0 if not chosen.

    Grid: T. Formula: the reference's `route`.
    """
    _route(
        router_logits,
        correction_bias,
        experts,
        weights,
        ranks,
        R,
        E,
        top_k,
        num_groups,
        topk_group,
        norm_topk_prob,
        routed_scaling_factor,
        first_expert,
        BLOCK_R,
        BLOCK_TOP_K,
    )


@_kernel
def route_and_quantize_kernel(
    x,
    router_logits,
    correction_bias,
    input_scale,
    x_fp8,
    experts,
    weights,
    ranks,
    L,
    R,
    E,
    top_k,
    num_groups,
    topk_group,
    norm_topk_prob,
    routed_scaling_factor,
    first_expert,
    BLOCK_R: tl.constexpr,
    BLOCK_TOP_K: tl.constexpr,
    BLOCK_L: tl.constexpr,
):
    """The outputs of `route_kernel`, and x_fp8 [T, L] = E4M3(x / input_scale), saturated by PTX's cvt.

    Grid: T, 1 + ⌈L / BLOCK_L⌉; a token's first program routes it, the others quantize.
    """
    if tl.program_id(1) == 0:
        _route(
            router_logits,
            correction_bias,
            experts,
            weights,
            ranks,
            R,
            E,
            top_k,
            num_groups,
            topk_group,
            norm_topk_prob,
            routed_scaling_factor,
            first_expert,
            BLOCK_R,
            BLOCK_TOP_K,
        )
    else:
        column = (tl.program_id(1) - 1) * BLOCK_L + tl.arange(0, BLOCK_L)
        start = tl.program_id(0).to(tl.int64) * L
        value = tl.load(x + start + column, mask=column < L, other=0.0).to(tl.float32)
        scaled = tl.div_rn(value, tl.load(input_scale) + tl.zeros_like(value))
        tl.store(x_fp8 + start + column, _to_e4m3(scaled), mask=column < L)


@triton.jit
def _to_e4m3(values):
    """FP32 values in E4M3, rounded once to nearest even, saturated at ±448; NaN stays NaN.

    Triton's own conversion rounds twice on SM 89: to FP16 toward zero, then to E4M3.
    """
    return tl.inline_asm_elementwise(
        """
        {
        .reg .b16 low, high;
        cvt.rn.satfinite.e4m3x2.f32 low, $2, $1;
        cvt.rn.satfinite.e4m3x2.f32 high, $4, $3;
        mov.b32 $0, {low, high};
        }
        """,
        "=r,f,f,f,f",
        [values],
        dtype=tl.float8e4nv,
        is_pure=True,
        pack=4,
    )


@triton.jit
def _divided(value, scale):
    """Value / scale, rounded as a division, with four instructions per value instead of a dozen."""
    # With the inverse alone, many BF16 values halfway between two E4M3 values would be rounded to the other one.
    inverse = tl.div_rn(1.0, scale)
    quotient = value * inverse
    remainder = tl.fma(-quotient, scale + tl.zeros_like(value), value)
    corrected = tl.fma(remainder, inverse + tl.zeros_like(value), quotient)
    return tl.where(
        quotient < 1e3, corrected, quotient
    )  # larger quotients saturate, and the remainder of inf is NaN


# 2. Permutation


@_kernel
def count_kernel(ranks, counts, T, BLOCK_E: tl.constexpr, CHUNK: tl.constexpr):
    """Counts [C, BLOCK_E]: the number of a chunk's tokens that chose each expert. Grid: C."""
    chunk = tl.program_id(0)
    expert = tl.arange(0, BLOCK_E)
    count_E = tl.zeros([BLOCK_E], tl.int32)
    for start in range(0, CHUNK, STEP):
        rank_SE = _ranks(ranks, chunk * CHUNK + start, T, expert, BLOCK_E)
        count_E += tl.sum((rank_SE > 0).to(tl.int32), axis=0)
    tl.store(counts + chunk * BLOCK_E + expert, count_E)


@_kernel
def place_kernel(
    ranks,
    counts,
    slots,
    blocks,
    T,
    top_k,
    num_chunks,
    max_blocks,
    block_rows,
    BLOCK_E: tl.constexpr,
    CHUNK: tl.constexpr,
    COUNTED: tl.constexpr,
):
    """Slots [T · k]: each row's slot, rows sorted by expert, then token; blocks [3, max_blocks].

    `blocks` has each block's expert (−1: no such block), first row and number of rows. Rows after the last expert's
    are not written. Grid: C; without `counts` (COUNTED = 0) there is one chunk, which is counted here.
    """
    chunk = tl.program_id(0)
    expert = tl.arange(0, BLOCK_E)
    total_E = tl.zeros([BLOCK_E], tl.int32)
    earlier_E = tl.zeros([BLOCK_E], tl.int32)
    if COUNTED:
        for start in range(0, num_chunks, STEP):
            row = start + tl.arange(0, STEP)
            at = row[:, None] * BLOCK_E + expert[None, :]
            count_SE = tl.load(counts + at, mask=(row < num_chunks)[:, None], other=0)
            total_E += tl.sum(count_SE, axis=0)
            earlier_E += tl.sum(tl.where((row < chunk)[:, None], count_SE, 0), axis=0)
    else:
        for start in range(0, T, STEP):
            total_E += tl.sum((_ranks(ranks, start, T, expert, BLOCK_E) > 0).to(tl.int32), axis=0)
    first_E = tl.cumsum(total_E, axis=0) - total_E

    next_E = first_E + earlier_E
    for start in range(chunk * CHUNK, tl.minimum(chunk * CHUNK + CHUNK, T), STEP):
        rank_SE = _ranks(ranks, start, T, expert, BLOCK_E)
        chosen_SE = (rank_SE > 0).to(tl.int32)
        row_SE = next_E[None, :] + tl.cumsum(chosen_SE, axis=0) - chosen_SE
        slot_SE = (start + tl.arange(0, STEP))[:, None] * top_k + rank_SE - 1
        tl.store(slots + row_SE, slot_SE, mask=rank_SE > 0)
        next_E += tl.sum(chosen_SE, axis=0)
    if chunk == 0:
        _write_blocks(blocks, total_E, first_E, expert, max_blocks, block_rows, BLOCK_E)


@triton.jit
def _ranks(ranks, start, T, expert, BLOCK_E: tl.constexpr):
    """The ranks of STEP tokens from `start` on, as int32 [STEP, BLOCK_E]; 0 past the last token."""
    token = start + tl.arange(0, STEP)
    at = token.to(tl.int64)[:, None] * BLOCK_E + expert[None, :]
    return tl.load(ranks + at, mask=(token < T)[:, None], other=0).to(tl.int32)


@triton.jit
def _write_blocks(blocks, total_E, first_E, expert, max_blocks, block_rows, BLOCK_E: tl.constexpr):
    count_E = (total_E + block_rows - 1) // block_rows
    block_E = tl.cumsum(count_E, axis=0) - count_E
    for i in range(tl.max(count_E, axis=0)):
        block, done = blocks + block_E + i, i * block_rows
        exists = i < count_E
        tl.store(block, expert, mask=exists)
        tl.store(block + max_blocks, first_E + done, mask=exists)
        tl.store(block + 2 * max_blocks, tl.minimum(total_E - done, block_rows), mask=exists)
    for start in range(tl.sum(count_E, axis=0), max_blocks, BLOCK_E):
        tl.store(blocks + start + expert, -1, mask=start + expert < max_blocks)


# 3. Matrix products


@triton.jit
def _tile(num_blocks, num_tiles, GROUP: tl.constexpr):
    """This program's block and tile of columns; GROUP blocks process the columns together, to share weights in L2."""
    program = tl.program_id(0)
    first = program // (GROUP * num_tiles) * GROUP
    width = tl.minimum(num_blocks - first, GROUP)
    within = program % (GROUP * num_tiles)
    return first + within % width, within // width


@triton.jit
def _block(blocks, block, max_blocks, DIRECT: tl.constexpr):
    """A block's expert (−1: none), first row and number of rows; with DIRECT, its one row is the slot of its number."""
    expert = tl.load(blocks + block)
    if DIRECT:
        first = block
        rows = 1
    else:
        # Not masked by the expert, so that the three loads are in flight at once.
        first = tl.load(blocks + max_blocks + block)
        rows = tl.load(blocks + 2 * max_blocks + block)
    return expert, first, rows


@triton.jit
def _product(
    rows_M,
    there_M,
    weight,
    weight_scale,
    row_scale,
    column_N,
    N,
    K,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    SWAP: tl.constexpr,
):
    """[BLOCK_M, BLOCK_N] FP32 = rows [·, K] at the pointers rows_M @ weight [N, K]ᵀ · weight_scale [N].

    With FP8 weights, the product is also multiplied by row_scale [1].
    """
    k_K = tl.arange(0, BLOCK_K)
    row_MK = rows_M[:, None] + k_K[None, :]
    weight_NK = weight + column_N[:, None] * K + k_K[None, :]
    there_N = column_N < N
    if SWAP:
        scale_N = tl.load(weight_scale + column_N, mask=there_N, other=0.0)
    sum_ = tl.zeros([BLOCK_N, BLOCK_M] if SWAP else [BLOCK_M, BLOCK_N], tl.float32)
    for start in range(0, K, BLOCK_K):
        within_K = k_K < K - start
        # Load weights first: their addresses do not depend on a load.
        b_NK = tl.load(weight_NK, mask=there_N[:, None] & within_K[None, :], other=0.0)
        a_MK = tl.load(row_MK, mask=there_M[:, None] & within_K[None, :], other=0.0)
        left = b_NK if SWAP else a_MK
        right = tl.trans(a_MK if SWAP else b_NK)
        if weight.dtype.element_ty == tl.float8e4nv:
            # Hopper's FP8 products accumulate with about 14 bits, so accumulate blocks in FP32. The alternative,
            # max_num_imprecise_acc, is broken: Triton 3.7's PTX reads the product before waiting for it.
            sum_ += tl.dot(left, right)
        else:
            sum_ = tl.dot(left, right, sum_, input_precision="ieee")
        row_MK += BLOCK_K
        weight_NK += BLOCK_K
    sum_MN = tl.trans(sum_) if SWAP else sum_
    if not SWAP:
        # Loading earlier would keep 32 registers per thread occupied, and prevent a second program per SM on SM 90.
        scale_N = tl.load(weight_scale + column_N, mask=there_N, other=0.0)
    if weight.dtype.element_ty == tl.float8e4nv:
        scale_N *= tl.load(row_scale)
    return sum_MN * scale_N[None, :]


@_kernel
def up_kernel(
    x,
    up,
    up_scale,
    input_scale,
    hidden_scale,
    blocks,
    slots,
    hidden,
    L,
    I,
    top_k,
    max_blocks,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP: tl.constexpr,
    SWAP: tl.constexpr,
    DIRECT: tl.constexpr,
    ROUND: tl.constexpr,
):
    """Hidden [T · k, I] = relu(x[token of row] @ up[expert]ᵀ · scale)², by row.

    With FP8 weights, x is already E4M3, and hidden is rounded to the dtype ROUND and then quantized. With DIRECT,
    `blocks` is `experts`. Grid: max_blocks · ⌈I / BLOCK_N⌉.
    """
    block, tile = _tile(max_blocks, tl.cdiv(I, BLOCK_N), GROUP)
    expert, first, rows = _block(blocks, block, max_blocks, DIRECT)
    if expert < 0:
        return
    row_M = tl.arange(0, BLOCK_M)
    column_N = tile * BLOCK_N + tl.arange(0, BLOCK_N)
    there_M = row_M < rows
    if DIRECT:
        token_M = tl.zeros([BLOCK_M], tl.int32)
    else:
        token_M = tl.load(slots + first + row_M, mask=there_M, other=0) // top_k
    sum_MN = _product(
        x + token_M.to(tl.int64) * L,
        there_M,
        up + expert.to(tl.int64) * I * L,
        up_scale + expert * I,
        input_scale,
        column_N,
        I,
        L,
        BLOCK_M,
        BLOCK_N,
        BLOCK_K,
        SWAP,
    )
    sum_MN = tl.where(sum_MN < 0, 0.0, sum_MN)  # NaN stays NaN
    hidden_MN = sum_MN * sum_MN
    if up.dtype.element_ty == tl.float8e4nv:
        if ROUND == "fp16":
            hidden_MN = hidden_MN.to(tl.float16).to(tl.float32)
        elif ROUND == "bf16":
            hidden_MN = hidden_MN.to(tl.bfloat16).to(tl.float32)
        hidden_MN = _to_e4m3(_divided(hidden_MN, tl.load(hidden_scale)))
    start = hidden + first.to(tl.int64) * I
    mask_MN = there_M[:, None] & (column_N < I)[None, :]
    tl.store(
        start + row_M[:, None] * I + column_N[None, :], hidden_MN.to(hidden.dtype.element_ty), mask=mask_MN
    )


@_kernel
def down_kernel(
    hidden,
    down,
    down_scale,
    hidden_scale,
    blocks,
    slots,
    parts,
    L,
    I,
    max_blocks,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP: tl.constexpr,
    SWAP: tl.constexpr,
    DIRECT: tl.constexpr,
):
    """Parts [T · k, L] FP32 = hidden[row] @ down[expert]ᵀ · scale, by slot.

    Grid: max_blocks · ⌈L / BLOCK_N⌉.
    """
    block, tile = _tile(max_blocks, tl.cdiv(L, BLOCK_N), GROUP)
    expert, first, rows = _block(blocks, block, max_blocks, DIRECT)
    if expert < 0:
        return
    row_M = tl.arange(0, BLOCK_M)
    column_N = tile * BLOCK_N + tl.arange(0, BLOCK_N)
    there_M = row_M < rows
    slot_M = first + row_M if DIRECT else tl.load(slots + first + row_M, mask=there_M, other=0)
    part_MN = _product(
        hidden + first.to(tl.int64) * I + row_M * I,
        there_M,
        down + expert.to(tl.int64) * L * I,
        down_scale + expert * L,
        hidden_scale,
        column_N,
        L,
        I,
        BLOCK_M,
        BLOCK_N,
        BLOCK_K,
        SWAP,
    )
    mask_MN = there_M[:, None] & (column_N < L)[None, :]
    tl.store(parts + slot_M.to(tl.int64)[:, None] * L + column_N[None, :], part_MN, mask=mask_MN)


# 4. Combine


@_kernel
def combine_kernel(parts, experts, weights, y, L, top_k, BLOCK_TOP_K: tl.constexpr, BLOCK_L: tl.constexpr):
    """Y [T, L] = Σ_k weight · part in FP32, in the order of rank, without experts that are not here.

    Grid: T, ⌈L / BLOCK_L⌉.
    """
    token = tl.program_id(0)
    column = tl.program_id(1) * BLOCK_L + tl.arange(0, BLOCK_L)
    sum_L = tl.zeros([BLOCK_L], tl.float32)
    for rank in tl.static_range(BLOCK_TOP_K):  # unrolled, so that all loads are in flight at once
        slot = token * top_k + rank
        here = tl.load(experts + slot, mask=rank < top_k, other=-1) >= 0
        weight = tl.load(weights + slot, mask=rank < top_k, other=0.0)
        part_L = tl.load(parts + slot.to(tl.int64) * L + column, mask=(column < L) & here, other=0.0)
        sum_L += weight * part_L
    tl.store(y + token.to(tl.int64) * L + column, sum_L.to(y.dtype.element_ty), mask=column < L)


# What is compiled, and what is launched


@dataclass(frozen=True)
class Tile:
    """The block sizes of a matrix product (rows, columns and terms) and how it is launched."""

    block_m: int
    block_n: int
    block_k: int
    num_warps: int
    num_stages: int
    group: int = 1
    swap: bool = False


def _tiles(sm: int, W: str) -> tuple[Tile, ...]:
    """The tiles of a weight dtype on an SM: for few rows per expert, some, many, and optionally many with wide columns.

    A block of K is 128 bytes, the widest swizzle of shared memory, or 128 terms if weights are streamed. Stages fill
    shared memory: 163 KB on SM 80, 227 KB on SM 90 and 100, 99 KB on the others. Tiles that stream weights leave room
    for two or three programs, so that one streams while another starts or ends.
    """
    if W == "float32":
        return Tile(16, 64, 32, 4, 2, swap=True), Tile(64, 64, 32, 4, 2, group=8)
    is_fp8 = W == FP8
    block_k = 128 if is_fp8 else 64
    if sm not in (80, 90, 100):
        few = Tile(16, 64, 128, 4, 5 if is_fp8 else 3, swap=True)
        return few, Tile(64, 128, block_k, 4, 3, group=8), Tile(128, 128, block_k, 8, 4, group=8)
    few = Tile(16, 128, 128, 4, 4 if is_fp8 else 3, swap=True)
    some = Tile(64, 128, block_k, 4, 4, group=8)
    if sm == 80:
        return few, some, Tile(128, 128, block_k, 8, 4, group=8)
    if is_fp8:  # wider columns would spill: see the second accumulator in `_product`
        return few, some, Tile(128, 128, block_k, 8, 6, group=8)
    return few, some, Tile(128, 128, block_k, 8, 3, group=8), Tile(128, 256, block_k, 8, 4, group=8)


def _chosen_tile(rows: int, columns: int, sm: int, W: str) -> Tile:
    """The tile for this average number of rows per expert and this number of columns."""
    few, some, *many = _tiles(sm, W)
    if rows <= few.block_m:
        return few
    if rows <= some.block_m or not many:
        return some
    wide = many[-1].block_n
    # Use wide tiles if padding the columns costs at most a sixteenth: true for Super's 2688, false for Nano's 1856.
    return many[-1] if -(-columns // wide) * wide * 16 <= columns * 17 else many[0]


def _pointer(dtype: str) -> str:
    return f"*{DType(dtype).triton}"


def _variant(
    kernel: Any, types: dict[str, str], constants: dict[str, Any], num_warps: int, num_stages: int
) -> Variant:
    """A variant whose pointers and sizes L and I are multiples of 16; parameters without a type are `i32`."""
    signature = {name: types.get(name, "i32") for name in kernel.arg_names if name not in constants}
    aligned = tuple(name for name, kind in signature.items() if kind.startswith("*") or name in ("L", "I"))
    return Variant(kernel.__name__, signature, constants, num_warps, num_stages, aligned)


def _block_r(dims: Mapping[str, int]) -> int:
    return 128 if max(dims["R"], dims["E"]) <= 128 else MAX_EXPERTS


def _route_variant(block_r: int, X: str, W: str) -> Variant:
    constants: dict[str, Any] = {"BLOCK_R": block_r, "BLOCK_TOP_K": MAX_TOP_K}
    types = dict.fromkeys(("router_logits", "correction_bias", "input_scale", "weights"), "*fp32")
    types |= {"experts": "*i32", "ranks": "*i8", "routed_scaling_factor": "fp32"}
    if W != FP8:
        return _variant(route_kernel, types, constants, 1, 1)
    types |= {"x": _pointer(X), "x_fp8": _pointer(FP8)}
    return _variant(route_and_quantize_kernel, types, constants | {"BLOCK_L": 512}, 1, 1)


def _count_variant(block_r: int) -> Variant:
    types = {"ranks": "*i8", "counts": "*i32"}
    return _variant(count_kernel, types, {"BLOCK_E": block_r, "CHUNK": CHUNK_TOKENS}, 4, 1)


def _place_variant(block_r: int, counted: bool) -> Variant:
    types = {"ranks": "*i8", "counts": "*i32", "slots": "*i32", "blocks": "*i32"}
    constants = {"BLOCK_E": block_r, "CHUNK": CHUNK_TOKENS, "COUNTED": int(counted)}
    return _variant(place_kernel, types, constants, 4 if block_r <= 128 else 8, 1)


def _tile_constants(tile: Tile, direct: bool) -> dict[str, Any]:
    return {
        "BLOCK_M": tile.block_m,
        "BLOCK_N": tile.block_n,
        "BLOCK_K": tile.block_k,
        "GROUP": tile.group,
        "SWAP": int(tile.swap),
        "DIRECT": int(direct),
    }


def _up_variant(tile: Tile, direct: bool, X: str, W: str) -> Variant:
    types = dict.fromkeys(("x", "up", "hidden"), _pointer(W))
    types |= dict.fromkeys(("up_scale", "input_scale", "hidden_scale"), "*fp32")
    types |= {"blocks": "*i32", "slots": "*i32"}
    constants = _tile_constants(tile, direct) | {"ROUND": DType(X).triton}
    return _variant(up_kernel, types, constants, tile.num_warps, tile.num_stages)


def _down_variant(tile: Tile, direct: bool, W: str) -> Variant:
    types = dict.fromkeys(("hidden", "down"), _pointer(W))
    types |= dict.fromkeys(("down_scale", "hidden_scale", "parts"), "*fp32")
    types |= {"blocks": "*i32", "slots": "*i32"}
    return _variant(down_kernel, types, _tile_constants(tile, direct), tile.num_warps, tile.num_stages)


def _combine_variant(block_top_k: int, X: str) -> Variant:
    types = {"parts": "*fp32", "experts": "*i32", "weights": "*fp32", "y": _pointer(X)}
    return _variant(combine_kernel, types, {"BLOCK_TOP_K": block_top_k, "BLOCK_L": 512}, 4, 1)


def _block_top_k(attributes: Mapping[str, float]) -> int:
    return 8 if attributes["top_k"] <= 8 else MAX_TOP_K


def variants(sm: int) -> Iterator[Variant]:
    """Every variant of the op on an SM; raises ValueError if the SM is not in `SMS`."""
    check_sm(SPEC.name, sm)
    weight_dtypes = (*FLOATS, FP8) if supports_fp8(sm) else FLOATS
    found: dict[str, Variant] = {}
    for W in weight_dtypes:
        for X in FLOATS if W == FP8 else (W,):
            listed = [_route_variant(block_r, X, W) for block_r in (128, MAX_EXPERTS)]
            listed += [_combine_variant(block_top_k, X) for block_top_k in (8, MAX_TOP_K)]
            for tile in _tiles(sm, W):
                for direct in (False, True) if tile.swap else (False,):
                    listed += [_up_variant(tile, direct, X, W), _down_variant(tile, direct, W)]
            found |= {variant.name: variant for variant in listed}
    for block_r in (128, MAX_EXPERTS):
        listed = [_count_variant(block_r), _place_variant(block_r, False), _place_variant(block_r, True)]
        found |= {variant.name: variant for variant in listed}
    yield from found.values()


@dataclass(frozen=True)
class Buffer:
    """A scratch buffer: its shape and dtype."""

    shape: tuple[int, ...]
    dtype: str

    @property
    def num_bytes(self) -> int:
        """Its size in the workspace, a multiple of 256, so that the next buffer is aligned."""
        return -(-prod(self.shape) * DType(self.dtype).itemsize // 256) * 256


def scratch(
    dims: Mapping[str, int], attributes: Mapping[str, int], dtypes: Mapping[str, str]
) -> dict[str, Buffer]:
    """The scratch buffers by name, in workspace order.

    Their sizes do not shrink with growing T and do not depend on the variants, so the workspace of the maximum T fits
    every T.
    """
    T, L, block_r, slots = dims["T"], dims["L"], _block_r(dims), dims["T"] * attributes["top_k"]
    found = {
        "experts": Buffer((slots,), "int32"),
        "weights": Buffer((slots,), "float32"),
        "ranks": Buffer((T, block_r), "int8"),
        "counts": Buffer((-(-T // CHUNK_TOKENS), block_r), "int32"),
        "slots": Buffer((slots,), "int32"),
        "blocks": Buffer((3, _num_blocks(dims, slots, 16)), "int32"),
        "hidden": Buffer((slots, dims["I"]), dtypes["W"]),
        "parts": Buffer((slots, L), "float32"),
    }
    return found | ({"x_fp8": Buffer((T, L), FP8)} if dtypes["W"] == FP8 else {})


def _num_blocks(dims: Mapping[str, int], slots: int, block_m: int) -> int:
    """The maximum number of blocks for these slots: each expert with slots may have one partial block."""
    return slots // block_m + min(dims["E"], slots)


def derived(
    dims: Mapping[str, int], attributes: Mapping[str, int], dtypes: Mapping[str, str], sm: int
) -> dict[str, int]:
    """The integer arguments other than axes and attributes: num_chunks, max_blocks, block_rows."""
    slots = dims["T"] * attributes["top_k"]
    block_m = _chosen_tile(slots // dims["R"], dims["I"], sm, dtypes["W"]).block_m
    return {
        "num_chunks": -(-dims["T"] // CHUNK_TOKENS),
        "max_blocks": slots if dims["T"] == 1 else _num_blocks(dims, slots, block_m),
        "block_rows": block_m,
    }


def launches(
    dims: Mapping[str, int], attributes: Mapping[str, Any], dtypes: Mapping[str, str], sm: int
) -> list[Launch]:
    """The kernels to launch, in order, from shapes, attributes and dtypes alone.

    Raises ValueError as `supports` does.
    """
    supports({**dims, **attributes}, dtypes, sm)
    T, L, I, X, W = dims["T"], dims["L"], dims["I"], dtypes["X"], dtypes["W"]
    if T == 0:
        return []
    direct = T == 1
    block_r = _block_r(dims)
    integers = derived(dims, attributes, dtypes, sm)
    rows = T * attributes["top_k"] // dims["R"]
    up_tile, down_tile = (_chosen_tile(rows, columns, sm, W) for columns in (I, L))
    up_columns, down_columns = -(-I // up_tile.block_n), -(-L // down_tile.block_n)

    plan = [(_route_variant(block_r, X, W), (T, -(-L // 512) + 1 if W == FP8 else 1))]
    if T > CHUNK_TOKENS:
        plan.append((_count_variant(block_r), (integers["num_chunks"], 1)))
    if not direct:
        plan.append((_place_variant(block_r, T > CHUNK_TOKENS), (integers["num_chunks"], 1)))
    plan += [
        (_up_variant(up_tile, direct, X, W), (integers["max_blocks"] * up_columns, 1)),
        (_down_variant(down_tile, direct, W), (integers["max_blocks"] * down_columns, 1)),
        (_combine_variant(_block_top_k(attributes), X), (T, -(-L // 512))),
    ]
    return [
        Launch(
            variant,
            (*grid, 1),
            {
                name: ({**dims, **attributes, **integers})[name]
                for name, kind in variant.signature.items()
                if kind == "i32"
            },
            _renames(variant, direct, W),
        )
        for variant, grid in plan
    ]


def _renames(variant: Variant, direct: bool, W: str) -> dict[str, str]:
    """Pointers of a product that are bound to other names: the experts of a single token, and x in FP8."""
    renames = {"blocks": "experts"} if direct else {}
    if W == FP8 and variant.kernel == "up_kernel":
        renames["x"] = "x_fp8"
    return {name: other for name, other in renames.items() if name in variant.signature}


def run(*tensors: torch.Tensor, **attributes: Any) -> tuple[torch.Tensor]:
    """Run the op like its reference, with the kernels; raises ValueError on unsupported inputs.

    Tensors are contiguous and on one device; on a CPU, the variants of SM 90 run in Triton's interpreter.
    """
    names = [tensor.name for tensor in SPEC.inputs]
    values: dict[str, Any] = dict(zip(names, tensors, strict=True))
    dims = SPEC.sizes([tuple(tensor.shape) for tensor in tensors])
    dtypes = {name: str(values[of].dtype).removeprefix("torch.") for name, of in (("X", "x"), ("W", "up"))}
    for name in names:
        if not values[name].is_contiguous():
            raise ValueError(f"{SPEC.name}: {name} is not contiguous: pass {name}.contiguous()")
    device = values["x"].device
    sm = device_sm(device)
    planned = launches(dims, attributes, dtypes, sm)
    values |= attributes
    for name, buffer in scratch(dims, attributes, dtypes).items():
        values[name] = torch.empty(buffer.shape, dtype=DType(buffer.dtype).torch, device=device)
    values["y"] = torch.empty_like(values["x"])
    execute(planned, values)
    return (values["y"],)


def execute(planned: Iterable[Launch], values: Mapping[str, Any]) -> None:
    """Launch a plan on tensors and attributes by name: writes y [T, L] and scratch."""
    for launch in planned:
        launch.start(globals()[launch.variant.kernel], values)
