"""ONNX helpers for groups of rows packed on one axis: the group of each row, and chunks that never cross groups.

The rows are tokens and the groups are their sequences. All integers are int64.
Legend: N groups, R rows, C chunks, J rows per chunk.
"""

from typing import NamedTuple

import onnx_ir as ir

from nemotrt.plugins.onnx_op import Operators


class Chunks(NamedTuple):
    """The chunks of all groups, in order; if every group is empty, there is one chunk without rows."""

    size: ir.Value
    """J, a scalar."""
    group_C: ir.Value
    """The group of each chunk."""
    row_CJ: ir.Value
    """The rows of each chunk. A chunk with fewer than J rows repeats its first row, never a row of another group, so
    that a NaN cannot spread to another group."""
    is_own_CJ: ir.Value
    """Which rows are not such repetitions."""
    stop_C: ir.Value
    """The end of each chunk's rows."""
    is_first_C: ir.Value
    """Whether a chunk is the first of its group."""
    first_N: ir.Value
    """The first chunk of each group."""
    last_N: ir.Value
    """The last chunk of each group; for an empty group, the chunk before it, at least 0."""


def last_axis_sum(op: Operators, condition: ir.Value) -> ir.Value:
    """The number of true elements along the last axis, int64."""
    return op.ReduceSum(op.cast(condition, ir.DataType.INT64), [-1], keepdims=0)  # type: ignore[no-any-return]


def scalar(op: Operators, value: ir.Value) -> ir.Value:
    """A one-element tensor as a scalar."""
    return op.Squeeze(value)  # type: ignore[no-any-return]


def size_of(op: Operators, value: ir.Value, axis: int) -> ir.Value:
    """The size of one axis, as a scalar."""
    return scalar(op, op.Shape(value, start=axis, end=axis + 1))


def bounds(op: Operators, start: ir.Value) -> tuple[ir.Value, ir.Value]:
    """The first row and the end [N] of each group, from the N + 1 starts."""
    return op.Slice(start, [0], [-1], [0]), op.Slice(start, [1], [2**31 - 1], [0])


def group_of_rows(op: Operators, end_N: ir.Value, num_rows: ir.Value) -> tuple[ir.Value, ir.Value]:
    """The group of each row [R], and whether it is in a group [R]; rows after the last end get the last group."""
    row_R = op.Range(0, num_rows, 1)
    group_R = last_axis_sum(op, op.GreaterOrEqual(op.Unsqueeze(row_R, [1]), end_N))
    last = op.Sub(size_of(op, end_N, 0), 1)
    return op.Min(group_R, last), op.LessOrEqual(group_R, last)


def written_slots(op: Operators, slot_B: ir.Value, length_B: ir.Value) -> ir.Value:
    """The row [B, 1] for each sequence's new state: its slot, or the scratch row if it has no token in this step."""
    slot_B = op.cast(slot_B, ir.DataType.INT64)
    return op.Unsqueeze(op.Where(op.Equal(length_B, 0), 0, slot_B), [1])  # type: ignore[no-any-return]


def chunks(op: Operators, start: ir.Value, size: ir.Value, num_rows: ir.Value) -> Chunks:
    """Split each group into chunks of `size` rows, the last of which may be shorter; `start` has N + 1 elements."""
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
    # If every group is empty, the one chunk may start after the last row.
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
