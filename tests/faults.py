"""Typical faults of an exporter, injected into the weights, nodes, op bodies or state of a correct graph.

Each fault breaks the first layer of a kind, so that a test knows which layer must be named.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import ml_dtypes  # noqa: F401  registers bfloat16 with NumPy
import numpy as np
import onnx
import onnx_ir as ir

from nemotrt.plugins import onnx_op
from nemotrt.plugins.causal_conv1d import SPEC as CONV
from nemotrt.plugins.moe_dispatch import SPEC as MOE
from nemotrt.plugins.paged_attention import SPEC as ATTENTION
from nemotrt.plugins.selective_scan import SPEC as SCAN

FIRST, LAST, AXIS = np.array([0]), np.array([-1]), np.array([0])
END = np.array([1 << 30])


class Graph:
    """A graph whose nodes and weights can be changed; weights are mapped from the file."""

    def __init__(self, path: Path) -> None:
        self.model = ir.load(path)
        self.nodes = self.model.graph
        self.weights: dict[str, np.ndarray] = {}
        for name, value in self.nodes.initializers.items():
            tensor = value.const_value
            if isinstance(tensor, ir.ExternalTensor):
                shape = tuple(tensor.shape.numpy())
                self.weights[name] = np.memmap(tensor.path, tensor.dtype.numpy(), "r+", tensor.offset, shape)

    def weight(self, ending: str) -> np.ndarray:
        """The first weight whose name has this ending."""
        return next(array for name, array in self.weights.items() if name.endswith(ending))

    def op(self, op_type: str) -> ir.Node:
        """The first node of this type."""
        return next(node for node in self.nodes if node.op_type == op_type)

    def named(self, ending: str) -> ir.Node:
        """The first node whose name has this ending."""
        return next(node for node in self.nodes if node.name and node.name.endswith(ending))

    def before(
        self, node: ir.Node, op_type: str, *operands: ir.Value | np.ndarray, **attributes: int
    ) -> ir.Value:
        """The result of a new node in front of `node`, named for the same layer."""
        inputs = [value if isinstance(value, ir.Value) else self.constant(node, value) for value in operands]
        made = ir.node(op_type, inputs, attributes, name=f"{node.name}.{op_type}.{len(self.nodes)}")
        made.outputs[0].name = f"wrong.{len(self.nodes)}"
        self.nodes.insert_before(node, made)
        return made.outputs[0]

    def constant(self, node: ir.Node, values: np.ndarray) -> ir.Value:
        """A new constant in front of `node`."""
        made = ir.node("Constant", [], {"value": ir.tensor(values)}, name=f"{node.name}.{len(self.nodes)}")
        made.outputs[0].name = f"constant.wrong.{len(self.nodes)}"
        self.nodes.insert_before(node, made)
        return made.outputs[0]

    def feed(self, node: ir.Node, name: str, value: ir.Value) -> None:
        """Replace the input of a node that has this name."""
        node.replace_input_with([taken.name for taken in node.inputs if taken].index(name), value)

    def put_out(self, old: ir.Value, new: ir.Value) -> None:
        """Make `new` the graph's output in place of `old`."""
        new.name, old.name = old.name, f"lost.{old.name}"
        new.type, new.shape = old.type, old.shape
        self.nodes.outputs[self.nodes.outputs.index(old)] = new


def broken(path: Path, inject: Callable[[Graph], None]) -> None:
    """Inject a fault into the graph at `path`; a fault in weights alone leaves the graph's file unchanged."""
    graph = Graph(path)
    before = ir.to_proto(graph.model)
    inject(graph)
    for array in graph.weights.values():
        array.flush()
    after = ir.to_proto(graph.model)
    if after != before:
        # An exporter would declare the types and shapes of its new values too.
        path.write_bytes(onnx.shape_inference.infer_shapes(after).SerializeToString())


def zeroed_expert(graph: Graph) -> None:
    graph.weight("experts.up")[1] = 0


def swapped_experts(graph: Graph) -> None:
    for name in ("experts.up", "experts.down"):
        weight = graph.weight(name)
        weight[[0, 1]] = weight[[1, 0]]


def shifted_a_log(graph: Graph) -> None:
    weight = graph.weight("mixer.A")
    weight[:] = np.roll(weight, 1)


def dropped_dt_bias(graph: Graph) -> None:
    graph.weight("dt_bias")[:] = 0


def reversed_taps(graph: Graph) -> None:
    weight = graph.weight("conv1d.weight")
    weight[:] = weight[:, ::-1].copy()


def dropped_conv_bias(graph: Graph) -> None:
    graph.weight("conv1d.bias")[:] = 0


def dropped_skip(graph: Graph) -> None:
    graph.weight("mixer.D")[:] = 0


def swapped_kv_heads(graph: Graph) -> None:
    """Queries of one group attend to the keys and values of another, as with a wrong map of heads to groups."""
    for name in ("k_proj.weight", "v_proj.weight"):
        weight = graph.weight(name)
        weight[:] = np.roll(weight, len(weight) // 2, axis=0)


def gate_after_norm(graph: Graph) -> None:
    """norm(y · silu(z)) becomes norm(y) · silu(z)."""
    gated, scaled = graph.named("mixer.norm.mul"), graph.named("mixer.norm.mul_1")
    plain, gate = gated.inputs
    ir.convenience.replace_all_uses_with(gated.outputs[0], plain)
    following = scaled.outputs[0].consumers()[0]
    graph.feed(following, scaled.outputs[0].name, graph.before(following, "Mul", scaled.outputs[0], gate))


def one_norm_group(graph: Graph) -> None:
    """The gated norm covers all channels at once instead of each group."""
    norm = graph.named("mixer.norm.rms_norm")
    groups = norm.inputs[0].producer()
    size = math.prod(norm.inputs[0].shape[1:])
    groups.replace_input_with(1, graph.constant(groups, np.array([0, 1, size])))
    norm.replace_input_with(1, graph.constant(norm, np.ones(size, dtype=np.float32)))
    groups.outputs[0].shape = norm.outputs[0].shape = None


def _experts_with(graph: Graph, **changes: float) -> ir.Function:
    """Give the first MoE layer other attributes, in its node and in a separate body."""
    node = graph.op(MOE.name)
    sizes = MOE.sizes([tuple(value.shape) for value in node.inputs])
    attributes = {name: node.attributes[name].value for name in MOE.attributes} | changes
    body = onnx_op.function(MOE, sizes, attributes)
    body.overload = node.overload = "wrong"
    graph.model.functions[body.identifier()] = body
    for name, value in changes.items():
        node.attributes[name] = body.attributes[name]
        assert node.attributes[name].value == value
    return body


def correction_in_weights(graph: Graph) -> None:
    """Experts are weighted by score plus correction, not by the score alone."""
    body = _experts_with(graph)
    weights = next(node for node in body if node.op_type == "GatherElements")
    corrected = next(node for node in body if node.op_type == "Add" and weights.inputs[0] in node.inputs)
    weights.replace_input_with(0, corrected.outputs[0])


def no_scaling_factor(graph: Graph) -> None:
    _experts_with(graph, routed_scaling_factor=1.0)


def one_expert_short(graph: Graph) -> None:
    top_k = graph.op(MOE.name).attributes["top_k"].value
    _experts_with(graph, top_k=top_k - 1)


def scaled_logits(graph: Graph) -> None:
    logits = graph.nodes.outputs[0]
    made = ir.node("Mul", [logits, graph.constant(logits.producer(), np.float32(1.05))], name="head.scaled")
    graph.nodes.append(made)
    graph.put_out(logits, made.outputs[0])


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


def page_mix_up(graph: Graph) -> None:
    """Every sequence reads and writes the pages of the previous sequence in the batch."""
    attention = graph.op(ATTENTION.name)
    table = onnx_op.operand(ATTENTION, attention, "page_table")
    tail = graph.before(attention, "Slice", table, LAST, END, AXIS)
    front = graph.before(attention, "Slice", table, FIRST, LAST, AXIS)
    graph.feed(attention, "page_table", graph.before(attention, "Concat", tail, front, axis=0))


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


@dataclass(frozen=True)
class Fault:
    """An exporter's fault, and the part of the model that it breaks."""

    name: str
    kind: str
    """The kind of the broken layer, which is the first of its kind; or `head`."""
    inject: Callable[[Graph], None]

    def place(self, layers: dict[int, str]) -> str:
        """The name of the broken part, from the kinds of the model's layers."""
        if self.kind == "head":
            return "head"
        return f"layers.{next(index for index, kind in layers.items() if kind == self.kind)}"


FAULTS = (
    Fault("an expert is zero", "moe", zeroed_expert),
    Fault("two experts swapped", "moe", swapped_experts),
    Fault("top-k one short", "moe", one_expert_short),
    Fault("correction bias enters the weights", "moe", correction_in_weights),
    Fault("scaling factor missing", "moe", no_scaling_factor),
    Fault("A_log shifted by a head", "mamba", shifted_a_log),
    Fault("dt_bias dropped", "mamba", dropped_dt_bias),
    Fault("skip (D) dropped", "mamba", dropped_skip),
    Fault("convolution's taps reversed", "mamba", reversed_taps),
    Fault("convolution's bias dropped", "mamba", dropped_conv_bias),
    Fault("gate after the norm", "mamba", gate_after_norm),
    Fault("one norm group for all", "mamba", one_norm_group),
    Fault("KV heads swapped", "attention", swapped_kv_heads),
    Fault("logits × 1.05", "head", scaled_logits),
    Fault("recurrent state in FP16", "mamba", half_state),
    Fault("a stale slot: state not written", "mamba", stale_slot),
    Fault("a fresh sequence reads its slot", "mamba", fresh_reads_slot),
    Fault("a page mix-up", "attention", page_mix_up),
    Fault("a packed boundary off by one", "mamba", moved_boundary),
)
