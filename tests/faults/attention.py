"""Faults of attention and of the pages that it reads."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import numpy as np

from faults.graph import AXIS, END, FIRST, LAST, Fault, Graph
from nemotrt.plugins import onnx_op
from nemotrt.plugins.paged_attention import SPEC as ATTENTION


def wrong_scale(graph: Graph) -> None:
    """1 / d instead of 1 / √d."""
    graph.with_body(ATTENTION, scale=graph.op(ATTENTION.name).attributes["scale"].value ** 2)


def _mask_moved(graph: Graph, op_type: str, *operands: int) -> None:
    """The last position that a query sees becomes that of `op_type` on it and each operand in turn."""
    _, body = graph.with_body(ATTENTION)
    mask = next(node for node in body.all_nodes() if node.op_type == "Greater")
    op = onnx_op.Operators(prefix="wrong_")
    position = mask.inputs[1]
    for name, operand in zip(op_type.split(), operands, strict=True):
        position = getattr(op, name)(position, operand)
    mask.graph.insert_before(mask, op.nodes)
    mask.replace_input_with(1, position)


def wide_mask(graph: Graph) -> None:
    """A query sees the token after it too."""
    _mask_moved(graph, "Add", 1)


def narrow_mask(graph: Graph) -> None:
    """A query does not see its own token, unless that is the first."""
    _mask_moved(graph, "Sub Max", 1, 0)


def heads_by_modulo(graph: Graph) -> None:
    """Query head q reads KV head q mod V, not q / (Q / V): heads are reordered before the op, and back after it."""
    attention = graph.op(ATTENTION.name)
    query = onnx_op.operand(ATTENTION, attention, "q")
    heads = np.arange(int(query.shape[1]))
    kv_heads = int(onnx_op.operand(ATTENTION, attention, "k").shape[1])
    order = np.argsort(heads % kv_heads, kind="stable")
    graph.after(attention.outputs[0], "Gather", np.argsort(order), axis=1)
    graph.feed(attention, query.name, graph.before(attention, "Gather", query, order, axis=1))


def page_mix_up(graph: Graph) -> None:
    """Every sequence reads and writes the pages of the previous sequence in the batch."""
    attention = graph.op(ATTENTION.name)
    table = onnx_op.operand(ATTENTION, attention, "page_table")
    tail = graph.before(attention, "Slice", table, LAST, END, AXIS)
    front = graph.before(attention, "Slice", table, FIRST, LAST, AXIS)
    graph.feed(attention, "page_table", graph.before(attention, "Concat", tail, front, axis=0))


def pages_wrong_from(first: int) -> Callable[[Graph], None]:
    """From this page of a sequence on, counted from 1, each is taken for the page before the first wrong one."""
    return partial(_pages_wrong_from, first=first)


def _pages_wrong_from(graph: Graph, first: int) -> None:
    attention = graph.op(ATTENTION.name)
    table = onnx_op.operand(ATTENTION, attention, "page_table")
    ones = graph.before(attention, "Shape", table, start=1, end=2)
    count = graph.before(attention, "Expand", np.array(1, dtype=np.int64), ones)
    place = graph.before(attention, "CumSum", count, np.array(0, dtype=np.int64))
    place = graph.before(attention, "Sub", place, np.array(1, dtype=np.int64))
    capped = graph.before(attention, "Min", place, np.array(first - 2, dtype=np.int64))
    graph.feed(attention, "page_table", graph.before(attention, "Gather", table, capped, axis=1))


FAULTS = (
    Fault("attention scale 1 / d", "attention", wrong_scale),
    Fault("mask one too wide", "attention", wide_mask),
    Fault("mask one too narrow", "attention", narrow_mask),
    Fault("KV head by modulo", "attention", heads_by_modulo),
    Fault("a page mix-up", "attention", page_mix_up),
    Fault("pages from the 2nd wrong", "attention", pages_wrong_from(2)),
    Fault("pages from the 3rd wrong", "attention", pages_wrong_from(3)),
    Fault("pages from the 9th wrong", "attention", pages_wrong_from(9)),
)
