"""Faults of the residual that a layer adds its result to."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from faults.graph import Fault, Graph


def _first_sum(graph: Graph) -> tuple[ir.Node, ir.Value, ir.Value]:
    """The node that adds a layer's result to its input, and both."""
    node = graph.named("layers.0.add")
    residual, addend = node.inputs
    return node, residual, addend


def no_residual(graph: Graph) -> None:
    node, _, addend = _first_sum(graph)
    ir.convenience.replace_all_uses_with(node.outputs[0], graph.before(node, "Identity", addend))
    graph.nodes.remove(node, safe=True)


def _scaled(graph: Graph, factor: float) -> None:
    """The product is computed in FP32, because BF16 has no number next to 1.005."""
    node, residual, addend = _first_sum(graph)
    wide = graph.before(node, "Cast", residual, to=ir.DataType.FLOAT)
    scaled = graph.before(node, "Mul", wide, np.float32(factor))
    # The value that the layer adds comes first, so that a part of the graph takes it for what it is.
    node.replace_input_with(0, addend)
    node.replace_input_with(1, graph.before(node, "CastLike", scaled, residual))


def residual_2_percent(graph: Graph) -> None:
    _scaled(graph, 1.02)


def residual_half_percent(graph: Graph) -> None:
    _scaled(graph, 1.005)


FAULTS = (
    Fault("residual missing", "mamba", no_residual),
    Fault("residual × 1.02", "mamba", residual_2_percent),
    Fault("residual × 1.005", "mamba", residual_half_percent),
)
