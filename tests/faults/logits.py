"""Faults of the logits after the head's weights."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx_ir as ir

from faults.graph import Fault, Graph
from nemotrt.plugins.contract import HEAD

BOUND = 20.0
"""Logits beyond it are clipped."""


def _last(graph: Graph, *operators: tuple[str, list[np.ndarray], dict[str, Any]]) -> None:
    """Make the result of these operators on the logits the graph's output."""
    logits = value = graph.nodes.outputs[0]
    for op_type, operands, attributes in operators:
        constants = [graph.constant(logits.producer(), operand) for operand in operands]
        made = ir.node(op_type, [value, *constants], attributes, name=f"head.wrong.{len(graph.nodes)}")
        graph.nodes.append(made)
        value = made.outputs[0]
        value.name = made.name
    graph.put_out(logits, value)


def scaled_logits(graph: Graph) -> None:
    _last(graph, ("Mul", [np.float32(1.05)], {}))


def clipped_logits(graph: Graph) -> None:
    _last(graph, ("Clip", [np.float32(-BOUND), np.float32(BOUND)], {}))


def half_logits(graph: Graph) -> None:
    _last(graph, *(("Cast", [], {"to": dtype}) for dtype in (ir.DataType.FLOAT16, ir.DataType.FLOAT)))


FAULTS = (
    Fault("logits × 1.05", HEAD, scaled_logits),
    Fault("logits clipped", HEAD, clipped_logits),
    Fault("logits through FP16", HEAD, half_logits),
)
