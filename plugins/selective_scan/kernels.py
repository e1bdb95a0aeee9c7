# mypy: disable-error-code="no-untyped-def, untyped-decorator"
# Python's types cannot express the types of a jit function's parameters.
"""The op's Triton kernels. Legend: Q tokens of a chunk, N state size, P columns of a piece of a head, R rows.

- `step_sequences`: a program owns ROWS rows of the state of one sequence and head. It loads them once, runs the
  recurrence over the tokens and stores them, so that reading and writing the state is nearly all the traffic.
- `prepare_chunks`: a program owns a chunk and a group. It writes the chunk's C · Bᵀ once for all heads of the group,
  and each head's Δ and running sum of Δ · A. It zeroes padding.
- `scan_sequences`: a program owns a piece of one head's columns, and processes the chunks of a sequence in order with
  the state [N, P] in registers.

If T ≤ B (decode), only `step_sequences` runs, which is correct for any lengths. Otherwise `prepare_chunks` and
`scan_sequences` process the sequences of more than STEP_TOKENS tokens, and `step_sequences` the others, so that
decodes in a mixed step cost the same as in a decode step. No two launches write the same row of the pool or of y, and
state is read only by the program that writes it, so the pool is updated in place.

Scanning chunks in order is cheaper than the form that is parallel over chunks, which writes and reads the state of
every chunk. For 8192 tokens of 128 heads × 64 with 8 groups and N 128, the parallel form moves 1359 MB, which takes
316 µs at the 4.3 TB/s that an H200 copies. The sequential form moves 310 MB (72 µs) and 17 MB of scratch that stay in
L2; its 44 GFLOP take 56 µs at 790 TFLOP/s. It is bound by the chain of chunks: one sequence gives 128 programs for
132 SMs with 128 chunks each, about a thousand instructions per warp and 48 KB per chunk, 0.8 GB of it from L2, which
is an estimated 150 to 200 µs (not measured). With few heads, they are split into pieces of 32 columns to fill the
SMs, and each piece reads B, C and C · Bᵀ again.

The place of a chunk in scratch needs no table: sequence b's chunks begin at query_start[b] // Q + b. Every sequence
has room for its chunks, since ⌊s/Q⌋ + ⌈l/Q⌉ ≤ ⌊(s + l)/Q⌋ + 1, and they end within T // Q + B.

Precision: sums, exponents and the state are FP32; factors of matrix products have x's dtype.
- Exponents are differences of running sums, clamped at 0 before exp2, so that a masked entry is 0 · 1 and never
  0 · ∞. The decay of a token is clamped at 2^−160, which is 0 in FP32, so that a step of −10⁶ does not absorb the
  following ones. Running sums are computed in FP64 and rounded once. The remaining relative error is 4e-4 after many
  tokens that erase the state, and far less otherwise. FP32 sums would round each following slow token again; errors
  of 4e-3 were measured.
- FP16 factors are divided by powers of two, so that none overflows, and only negligible ones are subnormal: C · Bᵀ by
  its maximum, Δ and the weights of x by the head's maximum in the chunk (all in `prepare_chunks`), and the state by
  its maximum at each chunk. BF16 has FP32's range and needs no scaling.
- FP32 x, which is for validation, uses the recurrence at any length: it is exact, but slow for long sequences.
The kernels assume A ≤ 0, as −exp(A_log) is, and finite inputs: a NaN affects its chunk, but no other sequence.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl

from nemotrt.plugins.contract import DType
from nemotrt.plugins.selective_scan import DTYPES, SPEC, STATE_SIZES, supports
from nemotrt.plugins.variant import Launch, Variant, check_sm, device_sm

LOG2E = tl.constexpr(1.4426950408889634)
LEAST_STEP = tl.constexpr(-160.0)
"""The strongest decay of one token, as a power of two: 0 in FP32."""
SEARCH = tl.constexpr(128)
"""Sequences that a program compares at a time when it searches for its own."""
LEAST_SCALED = tl.constexpr(2.0**-40)
"""The minimum for scaling: smaller factors are not scaled up further, so that quotients of scales fit in FP32."""
COLUMNS = tl.constexpr(128)
"""Columns of padding that a program of `prepare_chunks` zeroes at a time."""
ONE_EXPONENT = tl.constexpr(1 << 23)
"""The lowest bit of an FP32 exponent."""


@triton.jit
def _softplus(value):
    """log(1 + exp(value)) with FP32's relative accuracy, even for tiny results."""
    # log(1 + e) = 2 artanh(e / (2 + e)), whose argument is at most 1/3: eight terms of its series.
    e = tl.exp2(tl.abs(value) * -LOG2E)
    s = e / (2.0 + e)
    square = s * s
    series = 1.0 / 15.0
    series = series * square + 1.0 / 13.0
    series = series * square + 1.0 / 11.0
    series = series * square + 1.0 / 9.0
    series = series * square + 1.0 / 7.0
    series = series * square + 1.0 / 5.0
    series = series * square + 1.0 / 3.0
    series = series * square + 1.0
    return tl.maximum(value, 0.0) + 2.0 * s * series


@triton.jit
def _delta(raw, bias, dt_min, dt_max):
    """Δ from the raw dt: softplus and clamp, in FP32."""
    delta = _softplus(raw.to(tl.float32) + bias)
    return tl.clamp(delta, dt_min, dt_max, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def _power_of_two(largest, EXPONENT: tl.constexpr):
    """A power of two that scales numbers up to `largest` to below 2^(EXPONENT + 1), and its inverse; both exact."""
    bits = tl.maximum(largest, LEAST_SCALED).to(tl.int32, bitcast=True) & 0x7F800000
    bits -= EXPONENT * ONE_EXPONENT
    return bits.to(tl.float32, bitcast=True), (-bits + 254 * ONE_EXPONENT).to(tl.float32, bitcast=True)


# 1. One step, or a few


@triton.jit
def step_sequences(
    ssm_state,
    x,
    dt,
    A,
    B,
    C,
    D,
    dt_bias,
    query_start,
    context_len,
    slot,
    y,
    num_tokens,
    num_sequences,
    num_heads,
    num_groups,
    head_dim,
    step_tokens,
    dt_min,
    dt_max,
    N: tl.constexpr,
    ROWS: tl.constexpr,
):
    """Sequences of 1 … step_tokens tokens, and padding if step_tokens ≥ T. Grid: H · head_dim / ROWS, B."""
    sequence = tl.program_id(1)
    # Load everything that decides the next loads at once.
    start = tl.load(query_start + sequence)
    end = tl.load(query_start + sequence + 1)
    used = tl.load(query_start + num_sequences)
    pool_row = tl.load(slot + sequence).to(tl.int64)
    continued = tl.load(context_len + sequence) > 0
    width = num_heads * head_dim
    row = tl.program_id(0) * ROWS
    head = row // head_dim
    group = head // (num_heads // num_groups)
    r = tl.arange(0, ROWS)

    if step_tokens >= num_tokens:
        for token in range(used + sequence, num_tokens, num_sequences):
            tl.store(y + tl.cast(token, tl.int64) * width + row + r, tl.zeros([ROWS], y.dtype.element_ty))
    length = end - start
    if (length == 0) | (length > step_tokens):
        return

    n = tl.arange(0, N)
    ssm_state += (pool_row * width + row) * N
    at_RN = r[:, None] * N + n[None, :]
    stored_RN = tl.load(ssm_state + at_RN, mask=continued, other=0.0)
    x += start.to(tl.int64) * width + row
    y += start.to(tl.int64) * width + row
    dt += start.to(tl.int64) * num_heads + head
    B += (start.to(tl.int64) * num_groups + group) * N
    C += (start.to(tl.int64) * num_groups + group) * N
    x_R = tl.load(x + r)
    raw = tl.load(dt)
    B_N = tl.load(B + n)
    C_N = tl.load(C + n)
    decay_rate = tl.load(A + head) * LOG2E
    skip = tl.load(D + head)
    bias = tl.load(dt_bias + head)
    state_RN = stored_RN.to(tl.float32)
    for token in range(start, end):
        # Load the next token's inputs while this one's are used.
        is_next = token + 1 < end
        x += width
        dt += num_heads
        B += num_groups * N
        C += num_groups * N
        next_x_R = tl.load(x + r, mask=is_next, other=0.0)
        next_raw = tl.load(dt, mask=is_next, other=0.0)
        next_B_N = tl.load(B + n, mask=is_next, other=0.0)
        next_C_N = tl.load(C + n, mask=is_next, other=0.0)

        delta = _delta(raw, bias, dt_min, dt_max)
        value_R = x_R.to(tl.float32)
        state_RN *= tl.exp2(delta * decay_rate)
        state_RN += (delta * value_R)[:, None] * B_N.to(tl.float32)[None, :]
        y_R = tl.sum(state_RN * C_N.to(tl.float32)[None, :], axis=1) + skip * value_R
        tl.store(y + r, y_R.to(y.dtype.element_ty))
        y += width
        x_R = next_x_R
        raw = next_raw
        B_N = next_B_N
        C_N = next_C_N
    tl.store(ssm_state + at_RN, state_RN.to(ssm_state.dtype.element_ty))


# 2. Chunks


@triton.jit
def _owner(query_start, num_sequences, chunk, Q: tl.constexpr):
    """The last sequence whose chunks begin at or before this one; padding counts as one more sequence."""
    count = 0
    for first in range(0, num_sequences + 1, SEARCH):
        sequence = first + tl.arange(0, SEARCH)
        exists = sequence <= num_sequences
        start = tl.load(query_start + sequence, mask=exists, other=0)
        count += tl.sum((exists & (start // Q + sequence <= chunk)).to(tl.int32), axis=0)
    return count - 1


@triton.jit
def _long_sequence(query_start, num_sequences, n, step_tokens):
    """The n-th sequence (from 0) of more than step_tokens tokens; num_sequences if there are fewer."""
    index = 0
    seen = 0
    for first in range(0, num_sequences, SEARCH):
        sequence = first + tl.arange(0, SEARCH)
        exists = sequence < num_sequences
        start = tl.load(query_start + sequence, mask=exists, other=0)
        end = tl.load(query_start + sequence + 1, mask=exists, other=0)
        is_long = (end - start > step_tokens).to(tl.int32)
        rank = seen + tl.cumsum(is_long, axis=0)
        index += tl.sum((exists & (rank <= n)).to(tl.int32), axis=0)
        seen += tl.sum(is_long, axis=0)
    return index


@triton.jit
def prepare_chunks(
    dt,
    A,
    B,
    C,
    dt_bias,
    query_start,
    products,
    decays,
    scales,
    y,
    num_tokens,
    num_sequences,
    num_heads,
    num_groups,
    head_dim,
    step_tokens,
    dt_min,
    dt_max,
    N: tl.constexpr,
    Q: tl.constexpr,
    HEADS: tl.constexpr,
):
    """Chunks of sequences of more than step_tokens tokens, and all padding. Grid: T // Q + B + 1, G.

    products [chunks, G, Q, Q]: C_i · B_j for j ≤ i, else 0. decays [chunks, H, 2, Q]: log2 of the decay since the
    chunk's beginning, and Δ, which is 0 past the sequence's end. scales [chunks, H, 3], for FP16 only: the divisor
    of (C_i · B_j) Δ_j, the factor from Δ to a scaled weight of x, and the divisor of that weight.
    """
    chunk = tl.program_id(0)
    group = tl.program_id(1)
    heads = num_heads // num_groups
    q = tl.arange(0, Q)
    sequence = _owner(query_start, num_sequences, chunk, Q)
    is_padding = sequence == num_sequences
    start = tl.load(query_start + sequence)
    end = tl.load(query_start + sequence + 1, mask=sequence < num_sequences, other=num_tokens)
    first = start + (chunk - start // Q - sequence) * Q
    if first >= end:
        return
    if is_padding:
        at_Q1 = (tl.cast(first, tl.int64) * num_heads + group * heads) * head_dim + (
            q * num_heads * head_dim
        )[:, None]
        for column in range(0, heads * head_dim, COLUMNS):
            c = column + tl.arange(0, COLUMNS)
            is_inside = (q < end - first)[:, None] & (c < heads * head_dim)[None, :]
            tl.store(y + at_Q1 + c[None, :], tl.zeros([Q, COLUMNS], y.dtype.element_ty), mask=is_inside)
        return
    if end - start <= step_tokens:
        return

    dtype: tl.constexpr = B.dtype.element_ty
    n = tl.arange(0, N)
    is_token_Q = q < end - first
    at_QN = (tl.cast(first, tl.int64) * num_groups + group) * N + (q * (num_groups * N))[:, None] + n[None, :]
    B_QN = tl.load(B + at_QN, mask=is_token_Q[:, None], other=0.0)
    C_QN = tl.load(C + at_QN, mask=is_token_Q[:, None], other=0.0)
    product_QQ = tl.dot(C_QN, tl.trans(B_QN))
    product_QQ = tl.where(q[:, None] >= q[None, :], product_QQ, 0.0)
    product_scale = 1.0
    if dtype == tl.float16:
        product_scale, inverse = _power_of_two(tl.max(tl.abs(product_QQ), axis=None), 13)
        product_QQ *= inverse
    products += (chunk * num_groups + group).to(tl.int64) * (Q * Q)
    tl.store(products + q[:, None] * Q + q[None, :], product_QQ.to(dtype))

    for head in range(0, heads, HEADS):
        h = head + tl.arange(0, HEADS)
        is_head = h < heads
        h += group * heads
        is_raw = is_token_Q[:, None] & is_head[None, :]
        raw_QH = tl.load(
            dt + tl.cast(first, tl.int64) * num_heads + (q * num_heads)[:, None] + h[None, :],
            mask=is_raw,
            other=0.0,
        )
        A_H = tl.load(A + h, mask=is_head, other=0.0) * LOG2E
        bias_H = tl.load(dt_bias + h, mask=is_head, other=0.0)
        delta_QH = tl.where(is_raw, _delta(raw_QH, bias_H[None, :], dt_min, dt_max), 0.0)
        step_QH = tl.maximum(delta_QH * A_H[None, :], LEAST_STEP)
        at_H = chunk.to(tl.int64) * num_heads + h
        at_QH = at_H[None, :] * (2 * Q) + q[:, None]
        # FP64: after a token that erases the state, FP32 rounding errors would add up over the following slow tokens.
        decay_QH = tl.cumsum(step_QH.to(tl.float64), axis=0).to(tl.float32)
        if dtype == tl.float16:
            total_H = tl.sum(step_QH, axis=0)
            weight_QH = delta_QH * tl.exp2(tl.minimum(total_H[None, :] - decay_QH, 0.0))
            delta_scale_H, inverse_H = _power_of_two(tl.max(delta_QH, axis=0), 0)
            weight_scale_H, _ = _power_of_two(tl.max(weight_QH, axis=0), -1)
            delta_QH *= inverse_H[None, :]
            tl.store(scales + at_H * 3, product_scale * delta_scale_H, mask=is_head)
            tl.store(scales + at_H * 3 + 1, delta_scale_H / weight_scale_H, mask=is_head)
            tl.store(scales + at_H * 3 + 2, weight_scale_H, mask=is_head)
        tl.store(decays + at_QH, decay_QH, mask=is_head[None, :])
        tl.store(decays + at_QH + Q, delta_QH, mask=is_head[None, :])


@triton.jit
def _advance(
    state_NP,
    x_QP,
    weight_QQ,
    C_QN,
    B_QN,
    from_state_Q,
    to_end_Q,
    kept,
    skip,
    state_inverse,
    y_scale,
):
    """A chunk's y [Q, P] in FP32 and the state [N, P] after it (Dao and Gu 2024, arXiv 2405.21060, section 6)."""
    dtype: tl.constexpr = x_QP.dtype
    arriving_QP = (x_QP.to(tl.float32) * to_end_Q[:, None]).to(dtype)
    factor_NP = (state_NP * state_inverse).to(dtype)
    # Sums begin in the registers where products accumulate; in this order 80 columns do not spill on SM 90.
    state_NP = tl.dot(tl.trans(B_QN), arriving_QP, state_NP * kept)
    y_QP = tl.dot(C_QN, factor_NP) * from_state_Q[:, None]
    y_QP = tl.dot(weight_QQ, x_QP, y_QP)
    return y_QP * y_scale + skip * x_QP.to(tl.float32), state_NP


@triton.jit
def scan_sequences(
    ssm_state,
    x,
    B,
    C,
    D,
    query_start,
    context_len,
    slot,
    products,
    decays,
    scales,
    y,
    num_sequences,
    num_heads,
    num_groups,
    head_dim,
    step_tokens,
    N: tl.constexpr,
    Q: tl.constexpr,
    P: tl.constexpr,
    TAIL: tl.constexpr,
):
    """Sequences of more than step_tokens tokens, in turns. Grid: H · head_dim / (P + TAIL), turns.

    A piece has P columns plus TAIL columns with a separate state, since tiles are powers of two, and 80 is 64 + 16.
    """
    first_column = tl.program_id(0) * (P + TAIL)
    head = first_column // head_dim
    group = head // (num_heads // num_groups)
    width = num_heads * head_dim
    dtype: tl.constexpr = x.dtype.element_ty
    turn = tl.program_id(1)
    q = tl.arange(0, Q)
    n = tl.arange(0, N)
    p = tl.arange(0, P)

    sequence = _long_sequence(query_start, num_sequences, turn, step_tokens)
    while sequence < num_sequences:
        start = tl.load(query_start + sequence)
        end = tl.load(query_start + sequence + 1)
        continued = tl.load(context_len + sequence) > 0
        state = ssm_state + (tl.load(slot + sequence).to(tl.int64) * width + first_column) * N
        at_PN = p[:, None] * N + n[None, :]
        state_NP = tl.trans(tl.load(state + at_PN, mask=continued, other=0.0).to(tl.float32))
        if TAIL:
            tail = tl.arange(0, TAIL)
            tail_at_PN = (P + tail)[:, None] * N + n[None, :]
            tail_NP = tl.trans(tl.load(state + tail_at_PN, mask=continued, other=0.0).to(tl.float32))
        unit = 1.0  # for FP16, the scale of the state
        skip = tl.load(D + head)
        chunk = start // Q + sequence
        # Registers are scarce in this loop, so disable hoisting of values that can be recomputed.
        for first in tl.range(start, end, Q, disable_licm=True):
            # Past the end, load the last token again; its Δ is 0 there, so it has no weight.
            token_Q = tl.minimum(q, end - 1 - first)
            at_QN = (token_Q * (num_groups * N))[:, None] + n[None, :]
            from_BC = (tl.cast(first, tl.int64) * num_groups + group) * N
            B_QN = tl.load(B + from_BC + at_QN)
            C_QN = tl.load(C + from_BC + at_QN)
            from_x = tl.cast(first, tl.int64) * width + first_column
            x_QP = tl.load(x + from_x + (token_Q * width)[:, None] + p[None, :])
            from_product = (chunk * num_groups + group).to(tl.int64) * (Q * Q)
            product_QQ = tl.load(products + from_product + q[:, None] * Q + q[None, :])
            at_head = (chunk * num_heads + head).to(tl.int64)
            decay = decays + at_head * (2 * Q)
            decay_Q = tl.load(decay + q)
            delta_Q = tl.load(decay + Q + q)
            total = tl.load(decay + Q - 1)

            between_QQ = tl.minimum(decay_Q[:, None] - decay_Q[None, :], 0.0)
            weight_QQ = (product_QQ.to(tl.float32) * tl.exp2(between_QQ) * delta_Q[None, :]).to(dtype)
            to_end_Q = delta_Q * tl.exp2(tl.minimum(total - decay_Q, 0.0))
            from_state_Q = tl.exp2(decay_Q)
            kept = tl.exp2(total)
            y_scale = 1.0
            state_inverse = 1.0
            if dtype == tl.float16:
                y_scale = tl.load(scales + at_head * 3)
                to_end_Q *= tl.load(scales + at_head * 3 + 1)
                next_unit = tl.load(scales + at_head * 3 + 2)
                largest = tl.max(tl.abs(state_NP), axis=None)
                if TAIL:
                    largest = tl.maximum(largest, tl.max(tl.abs(tail_NP), axis=None))
                state_scale, state_inverse = _power_of_two(largest, 14)
                from_state_Q *= state_scale * unit / y_scale
                kept *= unit / next_unit
                unit = next_unit
            is_token_Q1 = (q < end - first)[:, None]
            if TAIL:
                tail_QP = tl.load(x + from_x + P + (token_Q * width)[:, None] + tail[None, :])
                y_QP, tail_NP = _advance(
                    tail_NP,
                    tail_QP,
                    weight_QQ,
                    C_QN,
                    B_QN,
                    from_state_Q,
                    to_end_Q,
                    kept,
                    skip,
                    state_inverse,
                    y_scale,
                )
                tl.store(
                    y + from_x + P + (token_Q * width)[:, None] + tail[None, :],
                    y_QP.to(dtype),
                    mask=is_token_Q1,
                )
            y_QP, state_NP = _advance(
                state_NP,
                x_QP,
                weight_QQ,
                C_QN,
                B_QN,
                from_state_Q,
                to_end_Q,
                kept,
                skip,
                state_inverse,
                y_scale,
            )
            tl.store(y + from_x + (token_Q * width)[:, None] + p[None, :], y_QP.to(dtype), mask=is_token_Q1)
            chunk += 1
        if dtype == tl.float16:
            state_NP *= unit
            if TAIL:
                tail_NP *= unit
        state = ssm_state + (tl.load(slot + sequence).to(tl.int64) * width + first_column) * N
        tl.store(state + at_PN, tl.trans(state_NP).to(ssm_state.dtype.element_ty))
        if TAIL:
            tl.store(state + tail_at_PN, tl.trans(tail_NP).to(ssm_state.dtype.element_ty))
        turn += tl.num_programs(1)
        sequence = _long_sequence(query_start, num_sequences, turn, step_tokens)


# 3. What is compiled, and what is launched

KERNELS = {
    "prepare_chunks": prepare_chunks,
    "scan_sequences": scan_sequences,
    "step_sequences": step_sequences,
}

POINTERS = {
    "prepare_chunks": ("dt", "A", "B", "C", "dt_bias", "query_start", "products", "decays", "scales", "y"),
    "scan_sequences": (
        *("ssm_state", "x", "B", "C", "D", "query_start", "context_len", "slot"),
        *("products", "decays", "scales", "y"),
    ),
    "step_sequences": (
        *("ssm_state", "x", "dt", "A", "B", "C", "D", "dt_bias"),
        *("query_start", "context_len", "slot", "y"),
    ),
}
"""Pointers of each kernel, in declaration order, by the SPEC's names and the workspace's.

`ssm_state` is both the input and the output pool. It comes first because `Variant.name` lists each dtype once, in
order, so that the name of a variant with an FP16 pool is different.
"""

INTEGERS = {
    "prepare_chunks": (
        *("num_tokens", "num_sequences", "num_heads", "num_groups"),
        *("head_dim", "step_tokens"),
    ),
    "scan_sequences": ("num_sequences", "num_heads", "num_groups", "head_dim", "step_tokens"),
    "step_sequences": (
        *("num_tokens", "num_sequences", "num_heads", "num_groups"),
        *("head_dim", "step_tokens"),
    ),
}
"""Runtime integers of each kernel, in declaration order, after its pointers."""

ATTRIBUTES: dict[str, tuple[str, ...]] = {
    "prepare_chunks": ("dt_min", "dt_max"),
    "scan_sequences": (),
    "step_sequences": ("dt_min", "dt_max"),
}
"""Attributes of each kernel (FP32), in declaration order, after its integers."""

STEP_TOKENS = 8
"""Sequences up to this length use the recurrence, even in a step with longer ones.

A chunk has the same cost for any number of tokens. The recurrence costs the state's traffic, until its arithmetic
takes longer: at about this many tokens, by an estimate, not a measurement.
"""

CHUNKED = ("float16", "bfloat16")
"""Dtypes of x for which the chunk kernels are used. FP32, for validation, always uses the exact recurrence."""

FULL_GPU = 96
"""Number of programs that fill a GPU: with fewer, heads are split into pieces of 32 columns."""

WALKERS = 1024
"""Maximum number of `scan_sequences` programs, but at least one per piece; they process the sequences in turns.

A program that finds no sequence costs an SM about half a microsecond (an estimate), since its shared memory allows
no other program at the same time. With one program per piece and sequence, the decodes of a mixed step would cost as
much as its prefill.
"""

HEADS_BLOCK = 16
"""Heads that `prepare_chunks` processes at a time."""


@dataclass(frozen=True)
class Piece:
    """The columns of a head that a `scan_sequences` program processes, P and TAIL, and its warps and stages."""

    P: int
    TAIL: int
    num_warps: int
    num_stages: int


def chunk_tokens(sm: int) -> int:
    """Q: 64 with warpgroup products (SM 90 and 100), else 32 to save registers."""
    return 64 if sm in (90, 100) else 32


def pieces(N: int, sm: int) -> dict[str, Piece]:
    """The pieces of heads, by use: `wide`, `narrow` (for few heads), `eighty` (for heads of 80 columns).

    Three stages load two chunks ahead; for N 256 on SM 90 and 100 they would need 244 KB of the 227 KB available. On
    SM 90 one warpgroup is enough, since a second would compute the chunk's weights again. But 80 columns need its
    registers, and with three stages FP16 would still spill. With these choices nothing spills on SM 90; on other SMs
    80 columns do, most on SM 120.
    """
    one_or_two = 4 if sm == 90 else 8
    if N == 256:
        return {"narrow": Piece(P=32, TAIL=0, num_warps=one_or_two, num_stages=2 if sm in (90, 100) else 3)}
    return {
        "wide": Piece(P=64, TAIL=0, num_warps=one_or_two, num_stages=3),
        "narrow": Piece(P=32, TAIL=0, num_warps=one_or_two, num_stages=3),
        "eighty": Piece(P=64, TAIL=16, num_warps=8, num_stages=2 if sm == 90 else 3),
    }


def piece_of(sizes: dict[str, int], sm: int) -> Piece:
    """The piece for these sizes: the widest that divides a head and gives every SM a program."""
    known = pieces(sizes["N"], sm)
    if "eighty" in known and sizes["P"] == 80:
        return known["eighty"]
    wide = known.get("wide")
    if wide and sizes["P"] % wide.P == 0 and sizes["H"] * sizes["P"] // wide.P >= FULL_GPU:
        return wide
    return known["narrow"]


def step_rows(P: int, N: int) -> int:
    """State rows per `step_sequences` program: 16 KB of an FP32 pool, or 8 KB for heads of 80 columns."""
    return 32 if P % 32 == 0 and N == 128 else 16


def variant(
    kernel: str,
    dtypes: Mapping[str, str],
    constants: Mapping[str, int],
    num_warps: int,
    num_stages: int,
) -> Variant:
    """The variant of a kernel for the SPEC's dtype variables."""
    kinds = {tensor.name: tensor.dtype for tensor in (*SPEC.inputs, *SPEC.outputs)}
    kinds |= {"products": "X", "decays": "float32", "scales": "float32"}
    signature = {name: f"*{DType(dtypes.get(kinds[name], kinds[name])).triton}" for name in POINTERS[kernel]}
    integers = INTEGERS[kernel]
    return Variant(
        kernel=kernel,
        signature=signature | dict.fromkeys(integers, "i32") | dict.fromkeys(ATTRIBUTES[kernel], "fp32"),
        constants=dict(constants),
        num_warps=num_warps,
        num_stages=num_stages,
        aligned=(*signature, *(("head_dim",) if "head_dim" in integers else ())),
    )


def prepare_variant(dtypes: Mapping[str, str], N: int, sm: int) -> Variant:
    """The variant of `prepare_chunks`."""
    constants = {"N": N, "Q": chunk_tokens(sm), "HEADS": HEADS_BLOCK}
    return variant("prepare_chunks", dtypes, constants, num_warps=4, num_stages=1)


def scan_variant(dtypes: Mapping[str, str], N: int, piece: Piece, sm: int) -> Variant:
    """The variant of `scan_sequences` for a piece."""
    constants = {"N": N, "Q": chunk_tokens(sm), "P": piece.P, "TAIL": piece.TAIL}
    return variant("scan_sequences", dtypes, constants, piece.num_warps, piece.num_stages)


def step_variant(dtypes: Mapping[str, str], N: int, rows: int) -> Variant:
    """The variant of `step_sequences`, with 16 state values per thread, so that many programs fit on an SM."""
    return variant("step_sequences", dtypes, {"N": N, "ROWS": rows}, num_warps=rows * N // 512, num_stages=1)


def variants(sm: int) -> Iterator[Variant]:
    """Every variant of the op on an SM; raises ValueError if the SM is not in `SMS`."""
    check_sm(SPEC.name, sm)
    for X, STATE in DTYPES:
        dtypes = {"X": X, "STATE": STATE}
        for N in STATE_SIZES:
            if X in CHUNKED and STATE == "float32":
                yield prepare_variant(dtypes, N, sm)
            if X in CHUNKED:
                for piece in pieces(N, sm).values():
                    yield scan_variant(dtypes, N, piece, sm)
            for rows in sorted({step_rows(P, N) for P in (64, 80)}):
                yield step_variant(dtypes, N, rows)


def is_step(sizes: dict[str, int], dtypes: Mapping[str, str]) -> bool:
    """Whether only `step_sequences` runs: if T ≤ B, as in decode, if T ≤ STEP_TOKENS, or for FP32."""
    return sizes["T"] <= max(sizes["B"], STEP_TOKENS) or dtypes["X"] not in CHUNKED


def workspace(
    sizes: dict[str, int], dtypes: Mapping[str, str], sm: int
) -> dict[str, tuple[str, tuple[int, ...]]]:
    """Dtype and shape of each scratch buffer, by name; none if `is_step`."""
    if is_step(sizes, dtypes):
        return {}
    Q = chunk_tokens(sm)
    chunks = sizes["T"] // Q + sizes["B"]
    return {
        "products": (dtypes["X"], (chunks, sizes["G"], Q, Q)),
        "decays": ("float32", (chunks, sizes["H"], 2, Q)),
        "scales": ("float32", (chunks, sizes["H"], 3)),
    }


def launches(sizes: dict[str, int], dtypes: Mapping[str, str], sm: int) -> list[Launch]:
    """The launches, in order, for these sizes (the SPEC's axes) and dtypes (its variables).

    Raises ValueError as `supports` does.
    """
    supports(sizes, dtypes, sm)
    T, B, H, P, G, N = (sizes[axis] for axis in ("T", "B", "H", "P", "G", "N"))
    rows = step_rows(P, N)
    plan = [(step_variant(dtypes, N, rows), (H * P // rows, B, 1))]
    if not is_step(sizes, dtypes):
        chunks = T // chunk_tokens(sm) + B
        piece = piece_of(sizes, sm)
        walkers = H * P // (piece.P + piece.TAIL)
        plan = [
            (prepare_variant(dtypes, N, sm), (chunks + 1, G, 1)),
            (scan_variant(dtypes, N, piece, sm), (walkers, min(B, triton.cdiv(WALKERS, walkers)), 1)),
            *plan,
        ]
    integers = {
        "num_tokens": T,
        "num_sequences": B,
        "num_heads": H,
        "num_groups": G,
        "head_dim": P,
        "step_tokens": T if is_step(sizes, dtypes) else STEP_TOKENS,
    }
    return [
        Launch(form, grid, {name: integers[name] for name in INTEGERS[form.kernel]}) for form, grid in plan
    ]


def run(
    *tensors: torch.Tensor, dt_min: float, dt_max: float, sm: int | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Run the op like its reference, with the kernels: inputs in SPEC order → y [T, H, P], pool [S, H, P, N].

    Runs on the tensors' device, or on a CPU in Triton's interpreter; `sm` selects the variants of another
    GPU than the device. Raises ValueError as `supports` does.
    """
    sizes = SPEC.sizes([tuple(tensor.shape) for tensor in tensors])
    dtypes = _dtypes(tensors)
    device = tensors[0].device
    sm = device_sm(device) if sm is None else sm
    plan = launches(sizes, dtypes, sm)
    buffers = {spec.name: tensor.contiguous() for spec, tensor in zip(SPEC.inputs, tensors, strict=True)}
    buffers["ssm_state"] = buffers["ssm_state"].clone()
    buffers["y"] = torch.empty_like(buffers["x"])
    for name, (dtype, shape) in workspace(sizes, dtypes, sm).items():
        buffers[name] = torch.empty(shape, dtype=getattr(torch, dtype), device=device)
    execute(plan, buffers, dt_min, dt_max)
    return buffers["y"], buffers["ssm_state"]


def execute(plan: list[Launch], buffers: dict[str, torch.Tensor], dt_min: float, dt_max: float) -> None:
    """Launch a plan on contiguous tensors by pointer name: writes y and scratch, updates ssm_state in place."""
    low, high = torch.tensor([dt_min, dt_max], dtype=torch.float32).tolist()  # as a plugin's fields are
    values: dict[str, Any] = {**buffers, "dt_min": low, "dt_max": high}
    for launch in plan:
        launch.start(KERNELS[launch.variant.kernel], values)


def _dtypes(tensors: tuple[torch.Tensor, ...]) -> dict[str, str]:
    """The value of each of the SPEC's dtype variables; raises ValueError that names a mismatching input."""
    variables: dict[str, str] = {}
    for spec, tensor in zip(SPEC.inputs, tensors, strict=True):
        dtype = DType.from_torch(tensor.dtype)
        expected = variables.setdefault(spec.dtype, dtype) if spec.dtype in SPEC.dtypes else spec.dtype
        if dtype != expected:
            raise ValueError(f"{SPEC.name}: {spec.name} is {dtype}, expected {expected}")
    return variables
