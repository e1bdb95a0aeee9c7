"""Faults that act beyond a number: of a slot, a page, a token in a step, a sequence in a batch, or a context."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import numpy as np
import onnx_ir as ir

from faults.graph import AXIS, END, FIRST, LAST, Fault, Graph
from nemotrt.plugins.moe_dispatch import SPEC as MOE
from nemotrt.plugins.paged_attention import SPEC as ATTENTION
from nemotrt.plugins.selective_scan import SPEC as SCAN


def slot_modulo(number: int) -> Callable[[Graph], None]:
    return partial(_modulo, op_type=SCAN.name, name="slot", number=number)


def page_modulo(number: int) -> Callable[[Graph], None]:
    return partial(_modulo, op_type=ATTENTION.name, name="page_table", number=number)


def _modulo(graph: Graph, op_type: str, name: str, number: int) -> None:
    node = graph.op(op_type)
    number_of = np.array(number, dtype=np.int32)
    graph.feed(node, name, graph.before(node, "Mod", graph.step_input(name), number_of))


def capped_context(tokens: int) -> Callable[[Graph], None]:
    return partial(_capped_context, tokens=tokens)


def _capped_context(graph: Graph, tokens: int) -> None:
    node = graph.op(ATTENTION.name)
    limit = np.array(tokens, dtype=np.int32)
    graph.feed(node, "context_len", graph.before(node, "Min", graph.step_input("context_len"), limit))


def _is_early(graph: Graph, node: ir.Node, rows: ir.Value, count: int) -> ir.Value:
    """Which rows are among the first."""
    shape = graph.before(node, "Shape", rows, start=0, end=1)
    ones = graph.before(node, "Expand", np.array(1, dtype=np.int64), shape)
    place = graph.before(node, "CumSum", ones, np.array(0, dtype=np.int64))
    return graph.before(node, "LessOrEqual", place, np.array(count, dtype=np.int64))


def lost_tokens(first: int) -> Callable[[Graph], None]:
    """The experts' input of a step's tokens from this one on is zero."""
    return partial(_lost_tokens, first=first)


def _lost_tokens(graph: Graph, first: int) -> None:
    node = graph.op(MOE.name)
    x = node.inputs[0]
    early = _is_early(graph, node, x, first)
    column = graph.before(node, "Unsqueeze", early, np.array([1], dtype=np.int64))
    zero = graph.before(node, "CastLike", np.array(0, dtype=np.float32), x)
    graph.feed(node, x.name, graph.before(node, "Where", column, x, zero))


def forgetful_sequences(first: int) -> Callable[[Graph], None]:
    """A batch's sequences from this one on, counted from 1, forget their state."""
    return partial(_forgetful_sequences, first=first)


def _forgetful_sequences(graph: Graph, first: int) -> None:
    node = graph.op(SCAN.name)
    context = graph.step_input("context_len")
    early = _is_early(graph, node, context, first - 1)
    fresh = np.array(0, dtype=np.int32)
    graph.feed(node, "context_len", graph.before(node, "Where", early, context, fresh))


def sorted_rows(graph: Graph) -> None:
    """The rows of logits come in the order of their tokens, not in the order of the request."""
    rows = graph.step_input("logits_row")
    head = next(use.node for use in rows.uses())
    count = graph.before(head, "Shape", rows)
    ordered = ir.node(
        "TopK", [rows, count], {"axis": 0, "largest": 0}, num_outputs=2, name=f"{head.name}.sort"
    )
    for number, value in enumerate(ordered.outputs):
        value.name = f"sorted.{number}"
    graph.nodes.insert_before(head, ordered)
    graph.feed(head, "logits_row", ordered.outputs[0])


def capped_tokens(graph: Graph) -> None:
    """The vocabulary's last token is taken for the one before."""
    ids = graph.step_input("input_ids")
    embeddings = next(use.node for use in ids.uses())
    last = len(graph.weight("embeddings.weight")) - 1
    graph.feed(
        embeddings, "input_ids", graph.before(embeddings, "Min", ids, np.array(last - 1, dtype=np.int64))
    )


def forgetful_chunks(length: int) -> Callable[[Graph], None]:
    """In every layer, a sequence with a chunk of exactly this many tokens forgets its state."""
    return partial(_forgetful_chunks, length=length)


def _forgetful_chunks(graph: Graph, length: int) -> None:
    start, context = graph.step_input("query_start"), graph.step_input("context_len")
    for node in [node for node in graph.nodes if node.op_type == SCAN.name]:
        first = graph.before(node, "Slice", start, FIRST, LAST, AXIS)
        end = graph.before(node, "Slice", start, FIRST + 1, END, AXIS)
        lengths = graph.before(node, "Sub", end, first)
        is_short = graph.before(node, "Equal", lengths, np.array(length, dtype=np.int32))
        fresh = np.array(0, dtype=np.int32)
        graph.feed(node, "context_len", graph.before(node, "Where", is_short, fresh, context))


FAULTS = (
    Fault("page number modulo 16", "attention", page_modulo(16)),
    Fault("slot modulo 8", "mamba", slot_modulo(8)),
    Fault("context capped at 512", "attention", capped_context(512)),
    Fault("context capped at 2,048", "attention", capped_context(2048)),
    Fault("tokens of a step from 128 on wrong", "moe", lost_tokens(128)),
    Fault("sequences from the 5th on wrong", "mamba", forgetful_sequences(5)),
)
