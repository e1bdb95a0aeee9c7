"""Faults as an exporter makes them, put into a right graph: its weights, its nodes, or the state that it carries."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import ml_dtypes  # noqa: F401  (NumPy then knows bfloat16)
import numpy as np
import onnx
import onnx_ir as ir
from onnx import helper

FLOATS = {1: "float32", 10: "float16", 16: "bfloat16"}


@dataclass
class Graph:
    """A graph whose nodes and weights can be changed; a weight is the file's own bytes."""

    proto: onnx.ModelProto
    weights: dict[str, np.ndarray]

    def weight(self, ending: str) -> np.ndarray:
        """The first weight whose name ends so."""
        return next(array for name, array in self.weights.items() if name.endswith(ending))

    def node(self, op: str) -> onnx.NodeProto:
        """The first node of an operator."""
        return next(node for node in self.proto.graph.node if node.op_type == op)

    def named(self, ending: str) -> onnx.NodeProto:
        """The first node whose name ends so."""
        return next(node for node in self.proto.graph.node if node.name.endswith(ending))

    def dtype(self, value: str) -> int:
        """The element type of a value."""
        graph = self.proto.graph
        known = (*graph.value_info, *graph.input, *graph.output)
        return next(entry.type.tensor_type.elem_type for entry in known if entry.name == value)

    def insert(self, node: onnx.NodeProto, like: onnx.NodeProto, op: str, result: str, *inputs: str) -> None:
        """A node before another, in its place in the model."""
        made = helper.make_node(op, list(inputs), [result], name=f"{like.name}.{op}.{result}")
        position = list(self.proto.graph.node).index(node)
        self.proto.graph.node.insert(position, made)
        known = (*self.proto.graph.value_info, *self.proto.graph.input, *self.proto.graph.output)
        typed = next((entry for entry in known if entry.name in inputs), None)
        if typed is not None:
            value = onnx.ValueInfoProto()
            value.CopyFrom(typed)
            value.name = result
            self.proto.graph.value_info.append(value)

    def constant(self, name: str, values: np.ndarray, element: int) -> str:
        """A small initialiser of an element type."""
        self.proto.graph.initializer.append(
            helper.make_tensor(name, element, values.shape, values.flatten().tolist())
        )
        return name


def open_graph(path: Path) -> Graph:
    """The graph, its weights mapped for writing."""
    proto = onnx.load(path, load_external_data=False)
    weights = {}
    for name, value in ir.load(path).graph.initializers.items():
        tensor = value.const_value
        if isinstance(tensor, ir.ExternalTensor):
            dtype = np.dtype(FLOATS[tensor.dtype.value])
            weights[name] = np.memmap(tensor.path, dtype, "r+", tensor.offset, tuple(tensor.shape.numpy()))
    return Graph(proto, weights)


def broken(path: Path, fault: Callable[[Graph], None]) -> None:
    """Put a fault into the graph at `path`."""
    graph = open_graph(path)
    fault(graph)
    for array in graph.weights.values():
        array.flush()
    path.write_bytes(graph.proto.SerializeToString())


def zeroed_expert(graph: Graph) -> None:
    graph.weight("experts.up")[1] = 0


def swapped_experts(graph: Graph) -> None:
    down = graph.weight("experts.down")
    down[[0, 1]] = down[[1, 0]]


def shifted_a_log(graph: Graph) -> None:
    graph.weight("mixer.A")[:] = np.roll(np.asarray(graph.weight("mixer.A")), 1)


def dropped_dt_bias(graph: Graph) -> None:
    graph.weight("dt_bias")[:] = 0


def reversed_taps(graph: Graph) -> None:
    weight = graph.weight("conv1d.weight")
    weight[:] = np.asarray(weight)[:, ::-1].copy()


def dropped_skip(graph: Graph) -> None:
    graph.weight("mixer.D")[:] = 0


def swapped_kv_heads(graph: Graph) -> None:
    weight = graph.weight("k_proj.weight")
    half = len(weight) // 2
    weight[:] = np.roll(np.asarray(weight), half, axis=0)


def gate_after_norm(graph: Graph) -> None:
    """y · silu(z) normalised becomes y normalised · silu(z)."""
    gate = graph.named("mixer.norm.mul")
    place = gate.name.removesuffix(".mul")
    product = gate.output[0]
    plain, gating = gate.input[0], gate.input[1]
    if "silu" in plain:
        plain, gating = gating, plain
    for node in graph.proto.graph.node:
        for i, name in enumerate(node.input):
            if name == product:
                node.input[i] = plain
    scaled = graph.named(f"{place.split('.')[1]}.mixer.norm.mul_1")
    following = next(node for node in graph.proto.graph.node if scaled.output[0] in node.input)
    graph.insert(following, scaled, "Mul", f"{place}.late", scaled.output[0], gating)
    following.input[list(following.input).index(scaled.output[0])] = f"{place}.late"


def one_norm_group(graph: Graph) -> None:
    """The gated norm over all channels, not each group: the groups' own scales are evened out."""
    norm = graph.named("mixer.norm.rms_norm")
    unflattened = next(node for node in graph.proto.graph.node if norm.input[0] in node.output)
    shape = next(t for t in graph.proto.graph.initializer if t.name == unflattened.input[1])
    groups = onnx.numpy_helper.to_array(shape)
    whole = np.array([0, 1, int(np.prod(groups[1:]))], dtype=np.int64)
    unflattened.input[1] = graph.constant("whole", whole, onnx.TensorProto.INT64)
    norm.input[1] = graph.constant("ones", np.ones(whole[2], dtype=np.float32), 1)
    for value in graph.proto.graph.value_info:
        if value.name in (unflattened.output[0], norm.output[0]):
            del value.type.tensor_type.shape.dim[1:]
            for size in whole[1:]:
                value.type.tensor_type.shape.dim.add().dim_value = int(size)


def correction_in_weights(graph: Graph) -> None:
    """Experts are weighted by score and correction: as if the router's logits held the correction."""
    moe = graph.node("NemoMoeDispatch")
    graph.insert(moe, moe, "Add", "corrected", moe.input[1], moe.input[2])
    moe.input[1] = "corrected"
    count = len(graph.weights[moe.input[2]])
    moe.input[2] = graph.constant("no_correction", np.zeros(count, dtype=np.float32), 1)


def _attribute(graph: Graph, op: str, name: str, value: float) -> None:
    """For every node of an op and in its body, which are one."""
    for node in graph.proto.graph.node:
        for attribute in node.attribute:
            if node.op_type == op and attribute.name == name:
                attribute.CopyFrom(helper.make_attribute(name, value))


def no_scaling_factor(graph: Graph) -> None:
    moe = graph.node("NemoMoeDispatch")
    factor = next(a.f for a in moe.attribute if a.name == "routed_scaling_factor")
    scale = graph.constant("unscaled", np.asarray(1 / factor, dtype=np.float32), graph.dtype(moe.output[0]))
    following = next(n for n in graph.proto.graph.node if moe.output[0] in n.input)
    graph.insert(following, moe, "Mul", "unscaled_experts", moe.output[0], scale)
    following.input[list(following.input).index(moe.output[0])] = "unscaled_experts"


def one_expert_fewer(graph: Graph) -> None:
    """The expert of the last rank is left out: its weight's share is moved to the others by a shifted correction."""
    moe = graph.node("NemoMoeDispatch")
    graph.weights[moe.input[2]][0] += 10.0


def scaled_logits(graph: Graph) -> None:
    head = (
        graph.weight("lm_head.weight")
        if any("lm_head" in n for n in graph.weights)
        else graph.weight("embeddings.weight")
    )
    head[:] = (np.asarray(head, dtype=np.float32) * 1.05).astype(head.dtype)


def _state_kept(graph: Graph, pool: str) -> None:
    """A pool's output is its input: what the step computed is lost."""
    for node in graph.proto.graph.node:
        for i, name in enumerate(node.output):
            if name.startswith(f"next.{pool}"):
                source = name.removeprefix("next.")
                node.output[i] = f"lost.{source}"
                made = helper.make_node("Identity", [source], [name], name=f"{node.name}.kept")
                position = list(graph.proto.graph.node).index(node)
                graph.proto.graph.node.insert(position + 1, made)
                typed = next(v for v in graph.proto.graph.output if v.name == name)
                value = onnx.ValueInfoProto()
                value.CopyFrom(typed)
                value.name = f"lost.{source}"
                graph.proto.graph.value_info.append(value)
                return


def stale_slot(graph: Graph) -> None:
    _state_kept(graph, "ssm_state")


def _fed(graph: Graph, op: str, name: str, make: Callable[[str], tuple[str, ...]], made_op: str) -> None:
    """An op of one layer gets another step input than it should."""
    node = graph.node(op)
    position = list(node.input).index(name)
    graph.insert(node, node, made_op, f"wrong.{name}", *make(name))
    node.input[position] = f"wrong.{name}"


def page_mix_up(graph: Graph) -> None:
    """Every sequence reads and writes the pages of the next one."""
    node = graph.node("NemoPagedAttention")
    last = graph.constant("last", np.array([-1]), 7)
    end = graph.constant("end", np.array([1 << 30]), 7)
    zero = graph.constant("zero", np.array([0]), 7)
    axis = graph.constant("axis0", np.array([0]), 7)
    graph.insert(node, node, "Slice", "tail", "page_table", last, end, axis)
    graph.insert(node, node, "Slice", "front", "page_table", zero, last, axis)
    position = list(graph.proto.graph.node).index(node)
    rolled = helper.make_node("Concat", ["tail", "front"], ["rolled"], name=f"{node.name}.rolled", axis=0)
    graph.proto.graph.node.insert(position, rolled)
    typed = next(v for v in graph.proto.graph.input if v.name == "page_table")
    value = onnx.ValueInfoProto()
    value.CopyFrom(typed)
    value.name = "rolled"
    graph.proto.graph.value_info.append(value)
    node.input[list(node.input).index("page_table")] = "rolled"


def fresh_taken_for_old(graph: Graph) -> None:
    """A fresh sequence reads what its slot held."""
    one = graph.constant("one", np.array([1]), 6)
    _fed(graph, "NemoSelectiveScan", "context_len", lambda name: (name, one), "Max")


def wrong_boundary(graph: Graph) -> None:
    """The convolution of one layer runs over the boundary of packed sequences, by one token."""
    node = graph.node("NemoCausalConv1d")
    position = list(graph.proto.graph.node).index(node)
    nodes = graph.proto.graph.node
    one = graph.constant("one_more", np.array([1]), 6)
    graph.insert(node, node, "Add", "later", "query_start", one)
    zero = graph.constant("none", np.array([0]), 6)
    graph.insert(node, node, "Equal", "at_start", "query_start", zero)
    graph.insert(node, node, "Where", "moved", "at_start", "query_start", "later")
    del position, nodes
    # The last boundary may not pass the last token.
    last = graph.constant("last_i", np.array([-1]), 7)
    end = graph.constant("end_i", np.array([1 << 30]), 7)
    axis = graph.constant("axis_i", np.array([0]), 7)
    graph.insert(node, node, "Slice", "total", "query_start", last, end, axis)
    graph.insert(node, node, "Min", "bounded", "moved", "total")
    node.input[list(node.input).index("query_start")] = "bounded"


def half_state(graph: Graph) -> None:
    """The recurrent state of a layer passes through FP16 in every step."""
    node = graph.node("NemoSelectiveScan")
    pool = next(name for name in node.input if name.startswith("ssm_state"))
    place = list(graph.proto.graph.node).index(node)
    down = helper.make_node("Cast", [pool], ["state16"], name=f"{node.name}.down", to=10)
    up = helper.make_node("Cast", ["state16"], ["state32"], name=f"{node.name}.up", to=1)
    for step, made in enumerate((down, up)):
        graph.proto.graph.node.insert(place + step, made)
    node.input[list(node.input).index(pool)] = "state32"


def no_conv_bias(graph: Graph) -> None:
    graph.weight("conv1d.bias")[:] = 0


FAULTS: dict[str, Callable[[Graph], None]] = {
    "an expert is zero": zeroed_expert,
    "two experts' down projections swapped": swapped_experts,
    "A shifted by one head": shifted_a_log,
    "dt_bias dropped": dropped_dt_bias,
    "convolution taps reversed": reversed_taps,
    "convolution bias dropped": no_conv_bias,
    "skip (D) dropped": dropped_skip,
    "KV heads swapped": swapped_kv_heads,
    "gate after the norm": gate_after_norm,
    "one norm group": one_norm_group,
    "correction bias enters the weights": correction_in_weights,
    "scaling factor missing": no_scaling_factor,
    "one expert always chosen": one_expert_fewer,
    "logits × 1.05": scaled_logits,
    "state in FP16": half_state,
    "state not written (stale slot)": stale_slot,
    "pages of another sequence": page_mix_up,
    "a fresh sequence reads its slot": fresh_taken_for_old,
    "a packed boundary off by one": wrong_boundary,
}
"""What went wrong → what does it to a graph."""
