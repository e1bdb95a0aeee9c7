"""The op's ONNX body, in standard operators. Legend: T tokens, B sequences, C channels, K taps, S slots."""

from collections.abc import Mapping
from typing import Any

import numpy as np
import onnx_ir as ir

from nemotrt.plugins.onnx_op import Operators
from nemotrt.plugins.ragged import bounds, group_of_rows, size_of, written_slots


def body(
    op: Operators, inputs: Mapping[str, ir.Value], sizes: Mapping[str, Any], _: Mapping[str, int | float]
) -> tuple[ir.Value, ir.Value]:
    """y and the next pool; each tap gathers rows of the histories [B·(K−1), C] and the tokens [T, C], concatenated."""
    taps = int(sizes["K"])
    kept = taps - 1
    start_B, end_B = bounds(op, op.cast(inputs["query_start"], ir.DataType.INT64))
    num_tokens, num_sequences = size_of(op, inputs["x"], 0), size_of(op, start_B, 0)
    num_history = op.Mul(num_sequences, kept)
    slot_B = op.cast(inputs["slot"], ir.DataType.INT64)

    old_BCK = op.Gather(inputs["conv_state"], slot_B, axis=0)
    zero = op.CastLike(0.0, inputs["x"])
    is_fresh_B = op.Equal(inputs["context_len"], op.cast(0, ir.DataType.INT32))
    history_BCK = op.Where(op.Unsqueeze(is_fresh_B, [1, 2]), zero, old_BCK)
    channels = op.Shape(inputs["bias"])
    history_RC = op.Reshape(op.Transpose(history_BCK, perm=[0, 2, 1]), op.Concat([-1], channels, axis=0))
    rows_RC = op.Concat(history_RC, inputs["x"], axis=0)

    def rows_before(position_I: ir.Value, token_I: ir.Value, sequence_I: ir.Value, lags: range) -> ir.Value:
        """The row at each lag before a token [I, lags]: a token of its sequence, or of its history."""
        lag_L = np.asarray(lags)
        in_history = op.Add(op.Unsqueeze(op.Add(op.Mul(sequence_I, kept), position_I), [1]), kept - lag_L)
        in_tokens = op.Add(op.Unsqueeze(op.Add(token_I, num_history), [1]), -lag_L)
        rows_IL: ir.Value = op.Where(
            op.GreaterOrEqual(op.Unsqueeze(position_I, [1]), lag_L), in_tokens, in_history
        )
        return rows_IL

    sequence_T, is_owned_T = group_of_rows(op, end_B, num_tokens)
    token_T = op.Range(0, num_tokens, 1)
    # Padding tokens get position 0 of the last sequence, so that their rows are in range; they are masked below.
    position_T = op.Where(is_owned_T, op.Sub(token_T, op.Gather(start_B, sequence_T)), 0)
    row_TK = rows_before(position_T, token_T, sequence_T, range(kept, -1, -1))
    weight_KC = op.Transpose(op.cast(inputs["weight"], ir.DataType.FLOAT), perm=[1, 0])
    sums_TC = op.cast(inputs["bias"], ir.DataType.FLOAT)
    for tap in range(taps):
        lagged_TC = op.Gather(rows_RC, op.Gather(row_TK, tap, axis=1), axis=0)
        weight_C = op.Gather(weight_KC, tap, axis=0)
        sums_TC = op.Add(sums_TC, op.Mul(op.cast(lagged_TC, ir.DataType.FLOAT), weight_C))
    silu_TC = op.Mul(sums_TC, op.Sigmoid(sums_TC))
    y_TC = op.CastLike(op.Where(op.Unsqueeze(is_owned_T, [1]), silu_TC, 0.0), inputs["x"])

    # The next history ends with the sequence's last token: position length, lags K−1 … 1.
    length_B = op.Sub(end_B, start_B)
    last_BK = rows_before(length_B, end_B, op.Range(0, num_sequences, 1), range(kept, 0, -1))
    new_BCK = op.Transpose(op.Gather(rows_RC, last_BK, axis=0), perm=[0, 2, 1])
    return y_TC, op.ScatterND(inputs["conv_state"], written_slots(op, slot_B, length_B), new_BCK)
