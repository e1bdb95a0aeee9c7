"""The op's ONNX body, in standard operators: chunks in order for prefill, one step of the recurrence for decode.

Legend: T tokens, B sequences, Q tokens per chunk, C chunks, H heads, P head dim, G groups, R = H / G, N state size.
"""

from collections.abc import Mapping
from typing import Any, NamedTuple

import onnx_ir as ir

from nemotrt.plugins.onnx_op import Operators
from nemotrt.plugins.ragged import bounds, chunks, group_of_rows, size_of, written_slots

CHUNK = 64
"""Tokens per chunk. Work inside a chunk grows with its square, and work between chunks with their number."""


class _Packed(NamedTuple):
    """The values that both forms use: tokens in FP32, and their sequences."""

    x_THP: ir.Value
    delta_TH: ir.Value
    A_H: ir.Value
    B_TGN: ir.Value
    C_TGN: ir.Value
    start_B: ir.Value
    end_B: ir.Value
    is_fresh_B: ir.Value
    pool_SHPN: ir.Value
    slot_B: ir.Value
    num_tokens: ir.Value
    sequence_T: ir.Value
    heads: int
    head_dim: int
    groups: int
    state_size: int


def body(
    op: Operators,
    inputs: Mapping[str, ir.Value],
    sizes: Mapping[str, Any],
    attributes: Mapping[str, int | float],
) -> tuple[ir.Value, ir.Value]:
    """y and the next pool, computed in FP32."""
    packed, is_owned_T = _read(op, inputs, sizes, attributes)
    length_B = op.Sub(packed.end_B, packed.start_B)
    # A new sequence has no state to step from, so double its length to choose the chunked form.
    longest = op.ReduceMax(op.Where(packed.is_fresh_B, op.Mul(length_B, 2), length_B), keepdims=0)
    y_THP, state_BHPN = op.If(
        op.LessOrEqual(longest, 1),
        then_branch=op.subgraph("step", lambda inner: _one_step(inner, packed)),
        else_branch=op.subgraph("chunked", lambda inner: _chunked(inner, packed)),
        outputs=2,
    )
    y_THP = op.Add(y_THP, op.Mul(op.Unsqueeze(inputs["D"], [1]), packed.x_THP))
    y_THP = op.CastLike(op.Where(op.Unsqueeze(is_owned_T, [1, 2]), y_THP, 0.0), inputs["x"])

    new_BHPN = op.CastLike(state_BHPN, inputs["ssm_state"])
    return y_THP, op.ScatterND(inputs["ssm_state"], written_slots(op, inputs["slot"], length_B), new_BHPN)


def _read(
    op: Operators,
    inputs: Mapping[str, ir.Value],
    sizes: Mapping[str, Any],
    attributes: Mapping[str, int | float],
) -> tuple[_Packed, ir.Value]:
    """The shared values, and which tokens belong to a sequence [T]."""
    float32 = ir.DataType.FLOAT
    start_B, end_B = bounds(op, op.cast(inputs["query_start"], ir.DataType.INT64))
    num_tokens = size_of(op, inputs["x"], 0)
    sequence_T, is_owned_T = group_of_rows(op, end_B, num_tokens)
    raw_TH = op.Add(op.cast(inputs["dt"], float32), inputs["dt_bias"])
    packed = _Packed(
        x_THP=op.cast(inputs["x"], float32),
        delta_TH=op.Clip(op.Softplus(raw_TH), float(attributes["dt_min"]), float(attributes["dt_max"])),
        A_H=inputs["A"],
        B_TGN=op.cast(inputs["B"], float32),
        C_TGN=op.cast(inputs["C"], float32),
        start_B=start_B,
        end_B=end_B,
        is_fresh_B=op.Equal(op.cast(inputs["context_len"], ir.DataType.INT64), 0),
        pool_SHPN=inputs["ssm_state"],
        slot_B=inputs["slot"],
        num_tokens=num_tokens,
        sequence_T=sequence_T,
        heads=int(sizes["H"]),
        head_dim=int(sizes["P"]),
        groups=int(sizes["G"]),
        state_size=int(sizes["N"]),
    )
    return packed, is_owned_T


def _one_step(op: Operators, packed: _Packed) -> tuple[ir.Value, ir.Value]:
    """y without the skip [T, H, P] and the states [B, H, P, N], when each sequence has one token and a past, or none.

    A sequence without a token gives a state that nobody reads: `written_slots` sends it to the scratch row.
    """
    heads, head_dim, groups, state_size = packed.heads, packed.head_dim, packed.groups, packed.state_size
    by_group = [0, groups, heads // groups * head_dim, -1]
    token_B = op.Min(packed.start_B, op.Sub(packed.num_tokens, 1))
    delta_BH = op.Gather(packed.delta_TH, token_B, axis=0)
    x_BHP = op.Gather(packed.x_THP, token_B, axis=0)
    B_BG1N = op.Unsqueeze(op.Gather(packed.B_TGN, token_B, axis=0), [2])
    C_BGN1 = op.Unsqueeze(op.Gather(packed.C_TGN, token_B, axis=0), [3])

    old_BHPN = op.cast(op.Gather(packed.pool_SHPN, packed.slot_B, axis=0), ir.DataType.FLOAT)
    decay_BH11 = op.Unsqueeze(op.Exp(op.Mul(delta_BH, packed.A_H)), [2, 3])
    input_BHP = op.Mul(op.Unsqueeze(delta_BH, [2]), x_BHP)
    outer = op.Mul(op.Reshape(input_BHP, by_group), B_BG1N)
    new_BHPN = op.Add(op.Mul(decay_BH11, old_BHPN), op.Reshape(outer, [0, heads, head_dim, state_size]))
    y_BHP = op.Reshape(op.MatMul(op.Reshape(new_BHPN, by_group), C_BGN1), [0, heads, head_dim])
    return op.Gather(y_BHP, packed.sequence_T, axis=0), new_BHPN


def _chunked(op: Operators, packed: _Packed) -> tuple[ir.Value, ir.Value]:
    """y without the skip [T, H, P] and the states [B, H, P, N]; the state is passed from chunk to chunk."""
    num_sequences = size_of(op, packed.start_B, 0)
    per_sequence = op.Div(op.Add(packed.num_tokens, op.Sub(num_sequences, 1)), num_sequences)
    start = op.Concat(packed.start_B, op.Slice(packed.end_B, [-1], [2**31 - 1], [0]), axis=0)
    table = chunks(op, start, op.Min(per_sequence, CHUNK), packed.num_tokens)
    place_Q = op.Range(0, table.size, 1)
    is_past_JI = op.LessOrEqual(op.Unsqueeze(place_Q, [1]), place_Q)
    inputs = [op.input(name) for name in ("state", "sequence", "is_first", "row", "is_own")]
    scan = op.subgraph(
        "chunk", lambda inner, *values: _chunk(inner, packed, table.size, is_past_JI, *values), inputs
    )
    _, y_CQHP, state_CHPN = op.Scan(
        op.Expand(0.0, [packed.heads, packed.head_dim, packed.state_size]),
        *(table.group_C, table.is_first_C, table.row_CJ, table.is_own_CJ),
        body=scan,
        num_scan_inputs=4,
        outputs=3,
    )
    position_T = op.Sub(op.Range(0, packed.num_tokens, 1), op.Gather(packed.start_B, packed.sequence_T))
    first_row_T = op.Mul(op.Gather(table.first_N, packed.sequence_T), table.size)
    y_RHP = op.Reshape(y_CQHP, [-1, packed.heads, packed.head_dim])
    # Padding tokens would be past the last chunk; the caller masks them.
    row_T = op.Min(op.Add(first_row_T, position_T), op.Sub(size_of(op, y_RHP, 0), 1))
    return op.Gather(y_RHP, row_T, axis=0), op.Gather(state_CHPN, table.last_N, axis=0)


def _chunk(
    op: Operators,
    packed: _Packed,
    size: ir.Value,
    is_past_JI: ir.Value,
    carried_HPN: ir.Value,
    sequence: ir.Value,
    is_first: ir.Value,
    row_Q: ir.Value,
    is_own_Q: ir.Value,
) -> tuple[ir.Value, ir.Value, ir.Value]:
    """The state after a chunk, twice (carried and kept), and its y [Q, H, P] (arXiv 2405.21060, section 6)."""
    heads, head_dim, groups, state_size = packed.heads, packed.head_dim, packed.groups, packed.state_size
    float32 = ir.DataType.FLOAT
    delta_QH = op.Gather(packed.delta_TH, row_Q, axis=0)
    delta_QH = op.Where(op.Unsqueeze(is_own_Q, [1]), delta_QH, 0.0)  # Δ = 0 does not change the state
    x_QHP = op.Gather(packed.x_THP, row_Q, axis=0)
    input_HPQ = op.Transpose(op.Mul(op.Unsqueeze(delta_QH, [2]), x_QHP), perm=[1, 2, 0])
    B_QGN = op.Gather(packed.B_TGN, row_Q, axis=0)
    C_GNQ = op.Transpose(op.Gather(packed.C_TGN, row_Q, axis=0), perm=[1, 2, 0])
    by_group = [groups, heads // groups * head_dim, -1]
    by_head = [heads, head_dim, -1]

    state_HPN = op.If(
        is_first,
        then_branch=op.subgraph("first", lambda inner: [_initial_state(inner, packed, sequence)]),
        else_branch=op.subgraph("carry", lambda inner: [carried_HPN]),
    )
    # The logarithm of the decay since the chunk's start is FP64: a token of strong decay makes it large, while the
    # small differences between later tokens matter.
    steps_QH = op.cast(op.Mul(delta_QH, packed.A_H), ir.DataType.DOUBLE)
    decay_HQ = op.Transpose(op.CumSum(steps_QH, 0), perm=[1, 0])
    from_state = op.MatMul(op.Reshape(state_HPN, by_group), C_GNQ)
    from_start_HQ = op.Exp(op.cast(decay_HQ, float32))
    from_state_HPQ = op.Mul(op.Reshape(from_state, by_head), op.Unsqueeze(from_start_HQ, [1]))

    # weights_HJI: the weight of input J in output I ≥ J, (C_I · B_J) exp(decay_I − decay_J).
    between_HJI = op.cast(op.Sub(op.Unsqueeze(decay_HQ, [1]), op.Unsqueeze(decay_HQ, [2])), float32)
    between_HJI = op.Exp(op.Where(is_past_JI, between_HJI, float("-inf")))
    dots_GJI = op.MatMul(op.Transpose(B_QGN, perm=[1, 0, 2]), C_GNQ)
    size = op.Unsqueeze(size, [0])
    grouped = op.Concat([groups, heads // groups], size, size, axis=0)
    weights = op.Mul(op.Reshape(between_HJI, grouped), op.Unsqueeze(dots_GJI, [1]))
    weights_HJI = op.Reshape(weights, op.Concat([heads], size, size, axis=0))
    y_HPQ = op.Add(from_state_HPQ, op.MatMul(input_HPQ, weights_HJI))

    final_H1 = op.Gather(decay_HQ, [-1], axis=1)
    to_end_HQ = op.Exp(op.cast(op.Sub(final_H1, decay_HQ), float32))
    arriving = op.Reshape(op.Mul(input_HPQ, op.Unsqueeze(to_end_HQ, [1])), by_group)
    added = op.MatMul(arriving, op.Transpose(B_QGN, perm=[1, 0, 2]))
    kept_HPN = op.Mul(op.Unsqueeze(op.Exp(op.cast(final_H1, float32)), [2]), state_HPN)
    next_HPN = op.Add(kept_HPN, op.Reshape(added, [heads, head_dim, state_size]))
    return next_HPN, op.Transpose(y_HPQ, perm=[2, 0, 1]), next_HPN


def _initial_state(op: Operators, packed: _Packed, sequence: ir.Value) -> ir.Value:
    """The state [H, P, N] at the start of a sequence: its slot's, or zero if the sequence is new."""
    slot = op.Gather(packed.slot_B, sequence)
    stored_HPN = op.cast(op.Gather(packed.pool_SHPN, slot, axis=0), ir.DataType.FLOAT)
    return op.Where(op.Gather(packed.is_fresh_B, sequence), 0.0, stored_HPN)  # type: ignore[no-any-return]
