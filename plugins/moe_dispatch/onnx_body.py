"""The op in standard ONNX operators: rows sorted by expert, one pair of products for each chunk of an expert's rows.

Legend: T tokens, k experts a token, A = T·k assignments, R routed experts, E experts here, L expert input size,
I inner size, C chunks, J rows of a chunk.
"""

from collections.abc import Mapping
from typing import Any

import onnx_ir as ir

from nemotrt.plugins.onnx_op import Operators
from nemotrt.plugins.ragged import chunks, size_of

CHUNK = 64
"""Rows a chunk at most: an expert's weights are read once a chunk, and a chunk's missing rows are computed in vain."""


def body(
    op: Operators,
    inputs: Mapping[str, ir.Value],
    sizes: Mapping[str, Any],
    attributes: Mapping[str, int | float],
) -> tuple[ir.Value]:
    """y, computed in FP32; the hidden activation is rounded to x's dtype, as the reference does."""
    experts, top_k = int(sizes["E"]), int(attributes["top_k"])
    chosen_Tk, weight_Tk = _route(op, inputs, sizes, attributes)
    local_A = op.Sub(op.Reshape(chosen_Tk, [-1]), int(attributes["first_expert"]))
    is_local_A = op.And(op.GreaterOrEqual(local_A, 0), op.Less(local_A, experts))
    expert_A = op.Where(is_local_A, local_A, experts)  # another rank's experts sort behind all of ours

    count_E, start = _offsets(op, expert_A, experts)
    size = op.Max(op.Min(op.ReduceMax(count_E, keepdims=0), CHUNK), 1)
    num_assigned = size_of(op, expert_A, 0)
    table = chunks(op, start, size, num_assigned)
    _, order_A = op.TopK(
        expert_A, op.Unsqueeze(num_assigned, [0]), largest=0, outputs=2
    )  # ties keep their order

    token_CJ = op.Div(op.Gather(order_A, table.row_CJ), top_k)

    def run_expert(inner: Operators, expert: ir.Value, token_J: ir.Value) -> list[ir.Value]:
        return [_expert(inner, inputs, inner.Gather(inputs["x"], token_J, axis=0), expert)]

    expert, token_J = op.input("expert", ir.DataType.INT64, 0), op.input("token", ir.DataType.INT64, 1)
    scan = op.subgraph("chunk", run_expert, [expert, token_J])
    parts_CJL = op.Scan(table.group_C, token_CJ, body=scan, num_scan_inputs=2)

    # Where each assignment's row went: its expert's first chunk, and its rank among that expert's rows.
    rank_A = op.ScatterElements(order_A, order_A, op.Range(0, num_assigned, 1), axis=0)
    own_A = op.Min(expert_A, experts - 1)
    row_A = op.Add(op.Mul(op.Gather(table.first_N, own_A), size), op.Sub(rank_A, op.Gather(start, own_A)))
    row_A = op.Where(is_local_A, row_A, 0)
    latent = op.Shape(inputs["x"], start=1)
    parts = op.Gather(op.Reshape(parts_CJL, op.Concat([-1], latent, axis=0)), row_A, axis=0)
    parts = op.Where(op.Unsqueeze(is_local_A, [1]), parts, 0.0)
    weighted = op.Mul(op.Reshape(weight_Tk, [-1, 1]), parts)
    parts_TkL = op.Reshape(weighted, op.Concat([-1, top_k], latent, axis=0))
    return (op.CastLike(op.ReduceSum(parts_TkL, [1], keepdims=0), inputs["x"]),)


def _offsets(op: Operators, expert_A: ir.Value, experts: int) -> tuple[ir.Value, ir.Value]:
    """Rows of each expert [E], and where each expert's rows start [E + 1]."""
    ones = op.Expand(1, op.Shape(expert_A))
    count = op.ScatterElements(op.Expand(0, [experts + 1]), expert_A, ones, axis=0, reduction="add")
    count_E = op.Slice(count, [0], [experts], [0])
    return count_E, op.Concat([0], op.CumSum(count_E, 0), axis=0)


def _expert(op: Operators, inputs: Mapping[str, ir.Value], rows_JL: ir.Value, expert: ir.Value) -> ir.Value:
    """down(relu(up x)²) of one expert for the rows of one chunk [J, L]."""

    def linear(rows: ir.Value, weights: str) -> ir.Value:
        weight = op.cast(op.Gather(inputs[weights], expert, axis=0), ir.DataType.FLOAT)
        product = op.Gemm(op.cast(rows, ir.DataType.FLOAT), weight, transB=1)
        return op.Mul(product, op.Gather(inputs[f"{weights}_scale"], expert))  # type: ignore[no-any-return]

    hidden_JI = op.Relu(linear(rows_JL, "up"))
    return linear(op.CastLike(op.Mul(hidden_JI, hidden_JI), rows_JL), "down")


def _route(
    op: Operators,
    inputs: Mapping[str, ir.Value],
    sizes: Mapping[str, Any],
    attributes: Mapping[str, int | float],
) -> tuple[ir.Value, ir.Value]:
    """The chosen experts [T, k] in order of rank, and their weights [T, k]."""
    scores_TR = op.Sigmoid(inputs["router_logits"])
    ranked_TR = op.Add(scores_TR, inputs["correction_bias"])
    groups = int(attributes["num_groups"])
    if groups > 1:
        per_group = int(sizes["R"]) // groups
        grouped_TGR = op.Reshape(ranked_TR, [0, groups, per_group])
        best, _ = op.TopK(grouped_TGR, [min(2, per_group)], axis=2, outputs=2)
        group_score_TG = op.ReduceSum(best, [2], keepdims=0)
        _, kept_Tg = op.TopK(group_score_TG, [int(attributes["topk_group"])], axis=1, outputs=2)
        penalty_TG = op.ScatterElements(
            op.Expand(float("-inf"), op.Shape(group_score_TG)),
            kept_Tg,
            op.Expand(0.0, op.Shape(kept_Tg)),
            axis=1,
        )
        ranked_TR = op.Reshape(op.Add(grouped_TGR, op.Unsqueeze(penalty_TG, [2])), op.Shape(ranked_TR))
    _, chosen_Tk = op.TopK(ranked_TR, [int(attributes["top_k"])], axis=1, outputs=2)
    weight_Tk = op.GatherElements(scores_TR, chosen_Tk, axis=1)
    if attributes["norm_topk_prob"]:
        total_T1 = op.ReduceSum(weight_Tk, [1], keepdims=1)
        weight_Tk = op.Div(weight_Tk, op.Add(total_T1, 1e-20))
    return chosen_Tk, op.Mul(weight_Tk, float(attributes["routed_scaling_factor"]))
