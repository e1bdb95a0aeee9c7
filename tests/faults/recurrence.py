"""Faults of a Mamba layer's convolution and recurrence, and of the state that it carries."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from faults.graph import AXIS, END, LAST, Fault, Graph, named
from nemotrt.plugins import onnx_op
from nemotrt.plugins.causal_conv1d import SPEC as CONV
from nemotrt.plugins.selective_scan import SPEC as SCAN


def overflowing_softplus(graph: Graph) -> None:
    """log(1 + exp(x)) also for large x, where exp overflows; PyTorch returns x above 20."""
    _, body = graph.with_body(SCAN)
    softplus = named(body, "Softplus")
    exponential = ir.node("Exp", softplus.inputs)
    is_infinite = ir.node("IsInf", exponential.outputs)
    exponential.outputs[0].name, is_infinite.outputs[0].name = "wrong.exp", "wrong.is_infinite"
    softplus.graph.insert_after(softplus, [exponential, is_infinite])
    result = ir.node("Where", [is_infinite.outputs[0], exponential.outputs[0], softplus.outputs[0]])
    result.outputs[0].name = "wrong.softplus"
    softplus.graph.insert_after(is_infinite, result)
    for use in softplus.outputs[0].uses():
        if use.node is not result:
            use.node.replace_input_with(use.idx, result.outputs[0])


def swapped_b_and_c(graph: Graph) -> None:
    scan = graph.op(SCAN.name)
    b, c = (SCAN.input_index(name) for name in ("B", "C"))
    values = scan.inputs[b], scan.inputs[c]
    scan.replace_input_with(b, values[1])
    scan.replace_input_with(c, values[0])


def no_silu(graph: Graph) -> None:
    """The convolution's result without its activation."""
    _, body = graph.with_body(CONV)
    sigmoid = named(body, "Sigmoid")
    (sums,) = sigmoid.inputs
    silu = sigmoid.outputs[0].consumers()[0]
    ir.convenience.replace_all_uses_with(silu.outputs[0], sums)


def dt_clamped_below(graph: Graph) -> None:
    """By `time_step_min`, which only initializes a model, in place of `time_step_limit`."""
    graph.with_body(SCAN, dt_min=0.001)


def dt_clamped_above(graph: Graph) -> None:
    """By `time_step_max`, which only initializes a model, in place of `time_step_limit`."""
    graph.with_body(SCAN, dt_max=0.1)


def groups_by_modulo(graph: Graph) -> None:
    """Head h reads B and C of group h mod G, not of group h / (H / G)."""
    scan = graph.op(SCAN.name)
    heads, groups = (int(onnx_op.operand(SCAN, scan, name).shape[1]) for name in ("x", "B"))
    _, body = graph.with_body(SCAN, {"G": heads})
    for name in ("B", "C"):
        value = body.inputs[SCAN.input_index(name)]
        op = onnx_op.Operators(prefix=f"wrong_{name}_")
        uses = value.uses()
        by_head = op.Gather(value, np.arange(heads) % groups, axis=1)
        body.graph.insert_before(body.graph[0], op.nodes)
        for use in uses:
            use.node.replace_input_with(use.idx, by_head)


def half_state(graph: Graph) -> None:
    """The recurrent state of a layer is rounded to FP16 in every step."""
    scan = graph.op(SCAN.name)
    state = onnx_op.operand(SCAN, scan, "ssm_state")
    half = graph.before(scan, "Cast", state, to=ir.DataType.FLOAT16)
    graph.feed(scan, state.name, graph.before(scan, "Cast", half, to=ir.DataType.FLOAT))


def stale_slot(graph: Graph) -> None:
    """The state that a step computes is lost, and the next step reads the old state."""
    scan = graph.op(SCAN.name)
    state = onnx_op.operand(SCAN, scan, "ssm_state")
    graph.put_out(scan.outputs[1], graph.before(scan, "Identity", state))


def fresh_reads_slot(graph: Graph) -> None:
    """A fresh sequence uses the old contents of its slot."""
    scan = graph.op(SCAN.name)
    length = onnx_op.operand(SCAN, scan, "context_len")
    graph.feed(scan, "context_len", graph.before(scan, "Max", length, np.array([1], dtype=np.int32)))


def moved_boundary(graph: Graph) -> None:
    """A sequence's first token counts as the last token of the previous sequence in the batch."""
    conv = graph.op(CONV.name)
    start = onnx_op.operand(CONV, conv, "query_start")
    is_first = graph.before(conv, "Equal", start, np.array([0], dtype=np.int32))
    later = graph.before(conv, "Add", start, np.array([1], dtype=np.int32))
    moved = graph.before(conv, "Where", is_first, start, later)
    total = graph.before(conv, "Slice", start, LAST, END, AXIS)
    graph.feed(conv, "query_start", graph.before(conv, "Min", moved, total))


FAULTS = (
    Fault("softplus without threshold", "mamba", overflowing_softplus),
    Fault("B and C swapped", "mamba", swapped_b_and_c),
    Fault("SiLU dropped", "mamba", no_silu),
    Fault("dt clamped below", "mamba", dt_clamped_below),
    Fault("dt clamped above", "mamba", dt_clamped_above),
    Fault("Mamba group by modulo", "mamba", groups_by_modulo),
    Fault("recurrent state in FP16", "mamba", half_state),
    Fault("a stale slot: state not written", "mamba", stale_slot),
    Fault("a fresh sequence reads its slot", "mamba", fresh_reads_slot),
    Fault("a packed boundary off by one", "mamba", moved_boundary),
)
