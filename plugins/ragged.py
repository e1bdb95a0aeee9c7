"""Rows of unequal groups, packed on one axis, in ONNX: a row's group, and chunks that never cross groups.

The rows are tokens and the groups their sequences, or routed rows and their experts. Legend: N groups, R rows,
C chunks, `size` rows a chunk. All integers are int64.
"""

from __future__ import annotations

from dataclasses import dataclass

import onnx_ir as ir

from nemotrt.plugins.onnx_op import Operators


@dataclass(frozen=True)
class Chunks:
    """The chunks of all groups in order, J rows each. A chunk of no rows stands alone when every group is empty."""

    size: ir.Value
    """J, a scalar."""
    group_C: ir.Value
    """The group that a chunk belongs to."""
    row_CJ: ir.Value
    """A chunk's rows; past its group's last row it repeats its first.

    So a chunk never reads another group's rows: a NaN stays in the group that made it.
    """
    is_own_CJ: ir.Value
    """Which of them are its own, not repeated."""
    stop_C: ir.Value
    """Where a chunk's own rows end."""
    is_first_C: ir.Value
    """Whether a chunk is its group's first."""
    first_N: ir.Value
    """Each group's first chunk."""
    last_N: ir.Value
    """Each group's last chunk, 0 when it has none and is the first."""


def last_axis_sum(op: Operators, condition: ir.Value) -> ir.Value:
    """How many are true along the last axis, int64."""
    return op.ReduceSum(op.cast(condition, ir.DataType.INT64), [-1], keepdims=0)  # type: ignore[no-any-return]


def scalar(op: Operators, value: ir.Value) -> ir.Value:
    """A one-element tensor as a scalar."""
    return op.Squeeze(value)  # type: ignore[no-any-return]


def size_of(op: Operators, value: ir.Value, axis: int) -> ir.Value:
    """The size of one axis, as a scalar."""
    return scalar(op, op.Shape(value, start=axis, end=axis + 1))


def bounds(op: Operators, start: ir.Value) -> tuple[ir.Value, ir.Value]:
    """Each group's first row and end [N], from the N + 1 starts."""
    return op.Slice(start, [0], [-1], [0]), op.Slice(start, [1], [2**31 - 1], [0])


def group_of_rows(op: Operators, end_N: ir.Value, num_rows: ir.Value) -> tuple[ir.Value, ir.Value]:
    """The group of each row [R], and whether it is in any [R]: rows past the last end count as the last group's."""
    row_R = op.Range(0, num_rows, 1)
    group_R = last_axis_sum(op, op.GreaterOrEqual(op.Unsqueeze(row_R, [1]), end_N))
    last = op.Sub(size_of(op, end_N, 0), 1)
    return op.Min(group_R, last), op.LessOrEqual(group_R, last)


def written_slots(op: Operators, slot_B: ir.Value, length_B: ir.Value) -> ir.Value:
    """Where each sequence's new state goes [B, 1]: its slot, or the scratch row for a sequence without a token."""
    slot_B = op.cast(slot_B, ir.DataType.INT64)
    return op.Unsqueeze(op.Where(op.Equal(length_B, 0), 0, slot_B), [1])  # type: ignore[no-any-return]


def chunks(op: Operators, start: ir.Value, size: ir.Value, num_rows: ir.Value) -> Chunks:
    """Cut each group's rows, from N + 1 starts, into chunks of `size`, the last of a group maybe shorter."""
    first_row_N, end_row_N = bounds(op, start)
    count_N = op.Div(op.Add(op.Sub(end_row_N, first_row_N), op.Sub(size, 1)), size)
    end_chunk_N = op.CumSum(count_N, 0)
    first_N = op.Sub(end_chunk_N, count_N)
    total = op.Max(op.ReduceMax(end_chunk_N, keepdims=0), 1)
    chunk_C = op.Range(0, total, 1)
    group_C, _ = group_of_rows(op, end_chunk_N, total)
    within_C = op.Sub(chunk_C, op.Gather(first_N, group_C))
    start_C = op.Add(op.Gather(first_row_N, group_C), op.Mul(within_C, size))
    stop_C = op.Min(op.Add(start_C, size), op.Gather(end_row_N, group_C))
    row_CJ = op.Add(op.Unsqueeze(start_C, [1]), op.Range(0, size, 1))
    is_own_CJ = op.Less(row_CJ, op.Unsqueeze(stop_C, [1]))
    # A chunk of no rows may stand past the last one.
    first_row_C1 = op.Unsqueeze(op.Min(start_C, op.Sub(num_rows, 1)), [1])
    return Chunks(
        size=size,
        group_C=group_C,
        row_CJ=op.Where(is_own_CJ, row_CJ, first_row_C1),
        is_own_CJ=is_own_CJ,
        stop_C=stop_C,
        is_first_C=op.Equal(within_C, 0),
        first_N=first_N,
        last_N=op.Max(op.Sub(end_chunk_N, 1), 0),
    )
