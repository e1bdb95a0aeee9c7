"""The op's ONNX body, in standard operators: appends keys and values, then attends in chunks of queries.

Legend: T tokens, B sequences, C chunks, I queries of a chunk, Q query heads, V key-value heads, D head dim, K pages,
M pages of a sequence, L keys that a chunk attends to.
"""

from collections.abc import Mapping
from typing import Any

import onnx_ir as ir

from nemotrt.plugins.onnx_op import Operators
from nemotrt.plugins.ragged import bounds, chunks, group_of_rows, size_of

CHUNK = 64
"""Query tokens per chunk; a chunk has query heads × CHUNK × context scores."""


def body(
    op: Operators,
    inputs: Mapping[str, ir.Value],
    sizes: Mapping[str, Any],
    attributes: Mapping[str, int | float],
) -> tuple[ir.Value, ir.Value]:
    """o and the next cache; the softmax is in FP32. If the cache is not FP8, its scales must be 1."""
    int64 = ir.DataType.INT64
    start_B, end_B = bounds(op, op.cast(inputs["query_start"], int64))
    context_B = op.cast(inputs["context_len"], int64)
    page_table_BM = op.cast(inputs["page_table"], int64)
    num_tokens, num_sequences = size_of(op, inputs["q"], 0), size_of(op, start_B, 0)
    sequence_T, is_owned_T = group_of_rows(op, end_B, num_tokens)
    # Padding tokens get position 0 of the scratch page; they are masked below.
    within_T = op.Sub(op.Range(0, num_tokens, 1), op.Gather(start_B, sequence_T))
    position_T = op.Where(is_owned_T, op.Add(op.Gather(context_B, sequence_T), within_T), 0)
    page_size = int(sizes["page"])
    cache = _append(op, inputs, sizes, page_table_BM, sequence_T, is_owned_T, position_T)

    per_sequence = op.Div(op.Add(num_tokens, op.Sub(num_sequences, 1)), num_sequences)
    start = op.Concat(start_B, op.Slice(end_B, [-1], [2**31 - 1], [0]), axis=0)
    table = chunks(op, start, op.Min(per_sequence, CHUNK), num_tokens)
    offset_C = op.Sub(op.Gather(context_B, table.group_C), op.Gather(start_B, table.group_C))
    seen_C = op.Add(table.stop_C, offset_C)
    num_pages_C = op.Max(op.Div(op.Add(seen_C, page_size - 1), page_size), 1)

    def attend(inner: Operators, *values: ir.Value) -> list[ir.Value]:
        sequence, row_I, position_I, seen, num_pages = values
        pages_M = inner.Gather(page_table_BM, sequence, axis=0)
        pages = inner.Slice(pages_M, [0], inner.Unsqueeze(num_pages, [0]), [0])
        q_IQD = inner.Gather(inputs["q"], row_I, axis=0)
        return [_attend(inner, inputs, sizes, attributes, q_IQD, position_I, seen, cache, pages)]

    names = ("sequence", "row", "position", "seen", "num_pages")
    scan = op.subgraph("chunk", attend, [op.input(name) for name in names])
    o_CIQD = op.Scan(
        *(
            table.group_C,
            table.row_CJ,
            op.Add(table.row_CJ, op.Unsqueeze(offset_C, [1])),
            seen_C,
            num_pages_C,
        ),
        body=scan,
        num_scan_inputs=len(names),
    )
    o_RQD = op.Reshape(o_CIQD, [-1, int(sizes["Q"]), int(sizes["D"])])
    first_row_T = op.Mul(op.Gather(table.first_N, sequence_T), table.size)
    row_T = op.Min(op.Add(first_row_T, within_T), op.Sub(size_of(op, o_RQD, 0), 1))
    o_TQD = op.Where(op.Unsqueeze(is_owned_T, [1, 2]), op.Gather(o_RQD, row_T, axis=0), 0.0)
    return op.CastLike(o_TQD, inputs["q"]), cache


def _append(
    op: Operators,
    inputs: Mapping[str, ir.Value],
    sizes: Mapping[str, Any],
    page_table_BM: ir.Value,
    sequence_T: ir.Value,
    is_owned_T: ir.Value,
    position_T: ir.Value,
) -> ir.Value:
    """The cache with every token's key and value in its row; padding tokens write zeros to row 0 of page 0."""
    page_size, kv_heads, head_dim = int(sizes["page"]), int(sizes["V"]), int(sizes["D"])
    page_index_T2 = op.Concat(
        op.Unsqueeze(sequence_T, [1]), op.Unsqueeze(op.Div(position_T, page_size), [1]), axis=1
    )
    page_T = op.Where(is_owned_T, op.GatherND(page_table_BM, page_index_T2), 0)
    row_T = op.Mod(position_T, page_size)
    shape = op.Concat(op.Shape(page_T), [2, kv_heads, 1], axis=0)

    def spread(values: ir.Value, axes: list[int]) -> ir.Value:
        return op.Expand(op.Unsqueeze(values, axes), shape)  # type: ignore[no-any-return]

    index_T2V4 = op.Concat(
        spread(page_T, [1, 2, 3]),
        spread(op.Range(0, 2, 1), [0, 2, 3]),
        spread(op.Range(0, kv_heads, 1), [0, 1, 3]),
        spread(row_T, [1, 2, 3]),
        axis=3,
    )
    both_T2VD = op.Concat(op.Unsqueeze(inputs["k"], [1]), op.Unsqueeze(inputs["v"], [1]), axis=1)
    scale_211 = op.Reshape(op.Concat(inputs["k_scale"], inputs["v_scale"], axis=0), [2, 1, 1])
    scaled_T2VD = op.Div(op.cast(both_T2VD, ir.DataType.FLOAT), scale_211)
    both_T2VD = op.CastLike(scaled_T2VD, inputs["kv_cache"])  # a cast to FP8 saturates
    zero = op.CastLike(op.Expand(0.0, [1, 1, 1, head_dim]), inputs["kv_cache"])
    updates = op.Where(op.Unsqueeze(is_owned_T, [1, 2, 3]), both_T2VD, zero)
    return op.ScatterND(inputs["kv_cache"], index_T2V4, updates)  # type: ignore[no-any-return]


def _attend(
    op: Operators,
    inputs: Mapping[str, ir.Value],
    sizes: Mapping[str, Any],
    attributes: Mapping[str, int | float],
    q_IQD: ir.Value,
    position_I: ir.Value,
    seen: ir.Value,
    cache: ir.Value,
    pages: ir.Value,
) -> ir.Value:
    """o of one chunk [I, Q, D] in FP32."""
    heads, kv_heads, head_dim = int(sizes["Q"]), int(sizes["V"]), int(sizes["D"])
    past = op.cast(op.Gather(cache, pages, axis=0), ir.DataType.FLOAT)  # [pages, 2, V, page, D]
    past_2VLD = op.Reshape(op.Transpose(past, perm=[1, 2, 0, 3, 4]), [2, kv_heads, -1, head_dim])
    keys_VLD, values_VLD = op.Gather(past_2VLD, 0, axis=0), op.Gather(past_2VLD, 1, axis=0)
    # Query heads of one key-value head are adjacent, so they are rows of one product.
    q_QID = op.Transpose(op.cast(q_IQD, ir.DataType.FLOAT), perm=[1, 0, 2])
    scale = op.Mul(inputs["k_scale"], float(attributes["scale"]))
    q_VRD = op.Reshape(op.Mul(q_QID, scale), [kv_heads, -1, head_dim])
    scores_VRL = op.MatMul(q_VRD, op.Transpose(keys_VLD, perm=[0, 2, 1]))
    keys = size_of(op, keys_VLD, 1)
    # Rows past the last key contain old data, possibly NaN, and 0 · NaN is NaN.
    is_seen_L1 = op.Unsqueeze(op.Less(op.Range(0, keys, 1), seen), [1])
    values_VLD = op.Where(is_seen_L1, values_VLD, 0.0)
    by_head = op.Concat([heads], op.Shape(position_I), op.Unsqueeze(keys, [0]), axis=0)
    is_future_IL = op.Greater(op.Range(0, keys, 1), op.Unsqueeze(position_I, [1]))
    scores_QIL = op.Where(is_future_IL, float("-inf"), op.Reshape(scores_VRL, by_head))
    probabilities_VRL = op.Reshape(op.Softmax(scores_QIL, axis=-1), op.Shape(scores_VRL))
    o_QID = op.Reshape(op.MatMul(probabilities_VRL, values_VLD), op.Shape(q_QID))
    o_QID = op.Mul(o_QID, inputs["v_scale"])
    return op.Transpose(o_QID, perm=[1, 0, 2])  # type: ignore[no-any-return]
