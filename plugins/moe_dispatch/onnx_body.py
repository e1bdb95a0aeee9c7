"""The op's ONNX body, in standard operators: a Scan over the experts, each of which processes the rows that chose it.

Scan passes each expert's weights without a copy, unlike Gather.

Legend: T tokens, k experts per token, A = T·k assignments, R routed experts, E experts here, L expert input size,
I inner size, J rows of one expert.
"""

from collections.abc import Mapping
from typing import Any

import onnx_ir as ir

from nemotrt.plugins.onnx_op import Operators


def body(
    op: Operators,
    inputs: Mapping[str, ir.Value],
    sizes: Mapping[str, Any],
    attributes: Mapping[str, int | float],
) -> tuple[ir.Value]:
    """y, computed in FP32; both activations are rounded as in the reference, see `_rounded`."""
    experts, top_k = int(sizes["E"]), int(attributes["top_k"])
    chosen_Tk, weight_Tk = _route(op, inputs, sizes, attributes)
    local_A = op.Sub(op.Reshape(chosen_Tk, [-1]), int(attributes["first_expert"]))
    is_local_A = op.And(op.GreaterOrEqual(local_A, 0), op.Less(local_A, experts))
    expert_A = op.Where(is_local_A, local_A, experts)  # other ranks' experts are sorted after ours
    _, order_A = op.TopK(expert_A, op.Shape(expert_A), largest=0, outputs=2)  # TopK keeps the order of ties
    token_A1 = op.Unsqueeze(op.Div(order_A, top_k), [1])
    weight_A1 = op.Unsqueeze(op.Gather(op.Reshape(weight_Tk, [-1]), order_A), [1])
    start_E, end_E = _bounds(op, expert_A, experts)
    x_TL = _rounded(op, inputs["x"], inputs["input_scale"], inputs["up"])

    def add_expert(
        inner: Operators,
        sum_TL: ir.Value,
        up_IL: ir.Value,
        down_LI: ir.Value,
        up_scale_I: ir.Value,
        down_scale_L: ir.Value,
        start_1: ir.Value,
        end_1: ir.Value,
        is_chosen: ir.Value,
    ) -> list[ir.Value]:
        def run(chosen: Operators) -> list[ir.Value]:
            token_J1 = chosen.Slice(token_A1, start_1, end_1, [0])
            rows_JL = chosen.GatherND(x_TL, token_J1)
            hidden_JI = chosen.Relu(_linear(chosen, rows_JL, up_IL, up_scale_I))
            hidden_JI = chosen.CastLike(chosen.Mul(hidden_JI, hidden_JI), inputs["x"])
            hidden_JI = _rounded(chosen, hidden_JI, inputs["hidden_scale"], down_LI)
            part_JL = _linear(chosen, hidden_JI, down_LI, down_scale_L)
            part_JL = chosen.Mul(part_JL, chosen.Slice(weight_A1, start_1, end_1, [0]))
            return [chosen.ScatterND(sum_TL, token_J1, part_JL, reduction="add")]

        return [
            inner.If(
                is_chosen,
                then_branch=inner.subgraph("run", run),
                else_branch=inner.subgraph("skip", lambda skipped: [sum_TL]),
            )
        ]

    names = ("sum", "up", "down", "up_scale", "down_scale", "start", "end", "is_chosen")
    scan = op.subgraph("expert", add_expert, [op.input(name) for name in names])
    none_TL = op.Expand(0.0, op.Shape(inputs["x"]))
    up_scale_EI = op.Mul(inputs["up_scale"], inputs["input_scale"])
    down_scale_EL = op.Mul(inputs["down_scale"], inputs["hidden_scale"])
    of_experts = (inputs["up"], inputs["down"], up_scale_EI, down_scale_EL)
    ranges = (op.Unsqueeze(start_E, [1]), op.Unsqueeze(end_E, [1]), op.Less(start_E, end_E))
    y_TL = op.Scan(none_TL, *of_experts, *ranges, body=scan, num_scan_inputs=7)
    return (op.CastLike(y_TL, inputs["x"]),)


def _bounds(op: Operators, expert_A: ir.Value, experts: int) -> tuple[ir.Value, ir.Value]:
    """The start and end [E] of each expert's assignments, sorted by expert."""
    ones = op.Expand(1, op.Shape(expert_A))
    count = op.ScatterElements(op.Expand(0, [experts + 1]), expert_A, ones, axis=0, reduction="add")
    count_E = op.Slice(count, [0], [experts], [0])
    end_E = op.CumSum(count_E, 0)
    return op.Sub(end_E, count_E), end_E


def _rounded(op: Operators, values: ir.Value, scale: ir.Value, weights: ir.Value) -> ir.Value:
    """values / scale rounded to the weights' dtype, in FP32.

    A cast to FP8 saturates. If the weights have x's dtype and the scale is 1, the values do not change.
    """
    scaled = op.Div(op.cast(values, ir.DataType.FLOAT), scale)
    return op.cast(op.CastLike(scaled, weights), ir.DataType.FLOAT)


def _linear(op: Operators, rows: ir.Value, weight: ir.Value, scale: ir.Value) -> ir.Value:
    """One expert's rows through one of its weights [outputs, inputs], in FP32."""
    product = op.Gemm(rows, op.cast(weight, ir.DataType.FLOAT), transB=1)
    return op.Mul(product, scale)  # type: ignore[no-any-return]


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
