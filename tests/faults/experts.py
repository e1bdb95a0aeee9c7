"""Faults of routing and of the experts' arithmetic."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from faults.graph import Fault, Graph, named, replaced
from nemotrt.plugins import onnx_op
from nemotrt.plugins.moe_dispatch import SPEC as MOE


def one_expert_short(graph: Graph) -> None:
    graph.with_body(MOE, top_k=graph.op(MOE.name).attributes["top_k"].value - 1)


def one_expert_more(graph: Graph) -> None:
    graph.with_body(MOE, top_k=graph.op(MOE.name).attributes["top_k"].value + 1)


def last_expert_twice(graph: Graph) -> None:
    """In every layer, the expert before the last computes with the last one's weights."""
    for node in [node for node in graph.nodes if node.op_type == MOE.name]:
        for name in ("up", "down"):
            weight = onnx_op.operand(MOE, node, name)
            expert = np.arange(int(weight.shape[0]))
            expert[-2] = expert[-1]
            graph.feed(node, weight.name, graph.before(node, "Gather", weight, expert, axis=0))


def negated_routers(graph: Graph) -> None:
    """In every layer, the routers' weights have the wrong sign."""
    for name, weight in graph.weights.items():
        if name.endswith("gate.weight"):
            weight[:] = -weight


def no_scaling_factor(graph: Graph) -> None:
    graph.with_body(MOE, routed_scaling_factor=1.0)


def not_normalized(graph: Graph) -> None:
    assert graph.op(MOE.name).attributes["norm_topk_prob"].value
    graph.with_body(MOE, norm_topk_prob=0)


def correction_in_weights(graph: Graph) -> None:
    """Experts are weighted by score plus correction, not by the score alone."""
    _, body = graph.with_body(MOE)
    weights = named(body, "GatherElements")
    corrected = next(node for node in body if node.op_type == "Add" and weights.inputs[0] in node.inputs)
    weights.replace_input_with(0, corrected.outputs[0])


def softmax_scores(graph: Graph) -> None:
    _, body = graph.with_body(MOE)
    scores = named(body, "Sigmoid")
    replaced(scores.outputs[0], "Softmax", scores.inputs[0], axis=-1)


def experts_without_relu(graph: Graph) -> None:
    _, body = graph.with_body(MOE)
    relu = named(body, "Relu")
    ir.convenience.replace_all_uses_with(relu.outputs[0], relu.inputs[0])


def mlp_without_relu(graph: Graph) -> None:
    relu = graph.named("mixer.relu")
    ir.convenience.replace_all_uses_with(relu.outputs[0], relu.inputs[0])


FAULTS = (
    Fault("top-k one short", "moe", one_expert_short),
    Fault("top-k one more", "moe", one_expert_more),
    Fault("scaling factor missing", "moe", no_scaling_factor),
    Fault("weights of chosen experts not normalized", "moe", not_normalized),
    Fault("correction bias enters the weights", "moe", correction_in_weights),
    Fault("softmax for sigmoid in the router", "moe", softmax_scores),
    Fault("x² without ReLU in the experts", "moe", experts_without_relu),
    Fault("x² without ReLU in an MLP", "mlp", mlp_without_relu),
)
