"""A small hybrid model written straight as a graph: the contract of a bundle's graph, without PyTorch.

Legend: T tokens, D hidden size, V vocabulary, H heads, P head dim, N state, G groups, C conv channels.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import ml_dtypes
import numpy as np
import onnx_ir as ir
from op_attributes import MOE

from nemotrt.exporter.runtime.manifest import Profile
from nemotrt.exporter.runtime.session import Session
from nemotrt.exporter.runtime.step import StepInputs
from nemotrt.plugins import onnx_op
from nemotrt.plugins.contract import STEP_INPUTS
from nemotrt.plugins.spec import DOMAIN, VERSION, OpSpec, ops

HIDDEN, VOCAB, PAGE = 16, 300, 4
HEADS, HEAD_DIM, STATE, GROUPS, TAPS = 4, 4, 8, 2, 4
INNER = HEADS * HEAD_DIM
CHANNELS = INNER + 2 * GROUPS * STATE
Q_HEADS, KV_HEADS = 4, 2
EXPERTS, EXPERT_SIZE = 4, 8
DTYPES = {
    "float32": (ir.DataType.FLOAT, np.float32),
    "float16": (ir.DataType.FLOAT16, np.float16),
    "bfloat16": (ir.DataType.BFLOAT16, ml_dtypes.bfloat16),
}
SPECS = {spec.label: spec for spec in ops()}


@dataclass
class GraphWriter:
    """Collects the nodes, weights and pools of one graph."""

    dtype: str
    op: onnx_op.Operators = field(default_factory=onnx_op.Operators)

    def __post_init__(self) -> None:
        self.step = {
            name: ir.val(name, ir.DataType(dtype.onnx), axes) for name, (dtype, axes) in STEP_INPUTS.items()
        }
        self.weights: list[ir.Value] = []
        self.pools: dict[str, tuple[ir.Value, ir.Value]] = {}
        self.functions: dict[str, ir.Function] = {}
        self._random = np.random.default_rng(0)

    def weight(self, *shape: int, dtype: str = "", scale: float = 0.5, shift: float = 0.0) -> ir.Value:
        name = f"weight.{len(self.weights)}"
        values = self._random.standard_normal(shape) * scale + shift
        ir_dtype, np_dtype = DTYPES[dtype or self.dtype]
        tensor = ir.Tensor(values.astype(np_dtype), dtype=ir_dtype, name=name)
        self.weights.append(ir.val(name, ir_dtype, list(shape), const_value=tensor))
        return self.weights[-1]

    def linear(self, x: ir.Value, inputs: int, outputs: int) -> ir.Value:
        return self.op.Gemm(x, self.weight(outputs, inputs), transB=1)

    def pool(self, name: str, axis: str, row: Sequence[int], dtype: str = "") -> ir.Value:
        ir_dtype = DTYPES[dtype or self.dtype][0]
        before, after = ir.val(name, ir_dtype, [axis, *row]), ir.val(f"next.{name}", ir_dtype, [axis, *row])
        self.pools[name] = (before, after)
        return before

    def call(
        self, spec: OpSpec, inputs: Sequence[ir.Value], sizes: dict[str, int], attributes: dict[str, float]
    ) -> ir.Value:
        """The op's node on the inputs before the packed ones; gives its first output."""
        packed = [self.step[tensor.name] for tensor in spec.inputs if tensor.name in self.step]
        pool = [inputs[i].name for i in spec.pools.values()]
        results = [ir.val(f"result.{len(self.op.nodes)}"), *(self.pools[name][1] for name in pool)]
        self.op.add(onnx_op.node(spec, [*inputs, *packed], results, attributes, results[0].name or ""))
        self.functions.setdefault(spec.name, onnx_op.function(spec, sizes, attributes))
        return results[0]


def _normed(writer: GraphWriter, x: ir.Value) -> ir.Value:
    op = writer.op
    weight = writer.weight(HIDDEN, dtype="float32", scale=0.2, shift=1.0)
    return op.cast(
        op.RMSNormalization(op.cast(x, ir.DataType.FLOAT), weight, axis=-1, epsilon=1e-5),
        DTYPES[writer.dtype][0],
    )


def _mamba(writer: GraphWriter, x: ir.Value, index: int) -> ir.Value:
    op = writer.op
    projected, dt = op.Split(writer.linear(x, HIDDEN, CHANNELS + HEADS), [CHANNELS, HEADS], axis=1, outputs=2)
    conv_state = writer.pool(f"conv_state.{index}", "S", (CHANNELS, TAPS - 1))
    weights = [writer.weight(CHANNELS, TAPS), writer.weight(CHANNELS)]
    y = writer.call(SPECS["conv"], [projected, *weights, conv_state], {"K": TAPS}, {})
    parts = op.Split(y, [INNER, GROUPS * STATE, GROUPS * STATE], axis=1, outputs=3)
    shapes = ([0, HEADS, HEAD_DIM], [0, GROUPS, STATE], [0, GROUPS, STATE])
    x_THP, B_TGN, C_TGN = (op.Reshape(part, shape) for part, shape in zip(parts, shapes, strict=True))
    A, D, dt_bias = (
        writer.weight(HEADS, dtype="float32", shift=shift, scale=0.2) for shift in (-1.0, 1.0, 0.0)
    )
    state = writer.pool(f"ssm_state.{index}", "S", (HEADS, HEAD_DIM, STATE), "float32")
    y = writer.call(
        SPECS["scan"],
        [x_THP, dt, A, B_TGN, C_TGN, D, dt_bias, state],
        {"H": HEADS, "P": HEAD_DIM, "G": GROUPS, "N": STATE},
        {"dt_min": 0.0, "dt_max": float("inf")},
    )
    return writer.linear(op.Reshape(y, [0, INNER]), INNER, HIDDEN)


def _attention(writer: GraphWriter, x: ir.Value, index: int) -> ir.Value:
    op = writer.op
    head_dim = 8
    q, k, v = (
        op.Reshape(writer.linear(x, HIDDEN, heads * head_dim), [0, heads, head_dim])
        for heads in (Q_HEADS, KV_HEADS, KV_HEADS)
    )
    cache = writer.pool(f"kv_cache.{index}", "K", (2, KV_HEADS, PAGE, head_dim))
    scales = [writer.weight(1, dtype="float32", scale=0, shift=1.0) for _ in range(2)]
    o = writer.call(
        SPECS["attention"],
        [q, k, v, cache, *scales],
        {"Q": Q_HEADS, "V": KV_HEADS, "D": head_dim, "page": PAGE},
        {"scale": head_dim**-0.5},
    )
    return writer.linear(op.Reshape(o, [0, Q_HEADS * head_dim]), Q_HEADS * head_dim, HIDDEN)


def _moe(writer: GraphWriter, x: ir.Value, _: int) -> ir.Value:
    op = writer.op
    router = writer.weight(EXPERTS, HIDDEN, dtype="float32")
    logits = op.Gemm(op.cast(x, ir.DataType.FLOAT), router, transB=1)
    up, down = writer.weight(EXPERTS, EXPERT_SIZE, HIDDEN), writer.weight(EXPERTS, HIDDEN, EXPERT_SIZE)
    ones = [writer.weight(size, dtype="float32", scale=0, shift=1.0) for size in (EXPERTS, EXPERTS, 1, 1)]
    bias = writer.weight(EXPERTS, dtype="float32", scale=0.1)
    sizes = {"E": EXPERTS, "R": EXPERTS, "L": HIDDEN, "I": EXPERT_SIZE}
    return writer.call(SPECS["experts"], [x, logits, bias, up, down, *ones], sizes, MOE)


MIXERS = {"M": _mamba, "*": _attention, "E": _moe}


def write_graph(folder: Path, *, dtype: str = "float32", pattern: str = "M*EM") -> Path:
    """A model of the pattern's layers at `folder`/model.onnx, its weights beside it."""
    writer = GraphWriter(dtype)
    op = writer.op
    x = op.Gather(writer.weight(VOCAB, HIDDEN, scale=1.0), writer.step["input_ids"], axis=0)
    for index, kind in enumerate(pattern):
        x = op.Add(x, MIXERS[kind](writer, _normed(writer, x), index))
    rows = op.Gather(_normed(writer, x), writer.step["logits_row"], axis=0)
    logits = op.cast(writer.linear(rows, HIDDEN, VOCAB), ir.DataType.FLOAT)
    logits.name, logits.shape = "logits", ir.Shape(["R", VOCAB])
    logits.dtype = ir.DataType.FLOAT
    used = {value for node in op.nodes for value in node.inputs}
    inputs = [value for value in writer.step.values() if value in used]
    graph = ir.Graph(
        [*inputs, *(before for before, _ in writer.pools.values())],
        [logits, *(after for _, after in writer.pools.values())],
        nodes=op.nodes,
        initializers=writer.weights,
        opset_imports={"": onnx_op.OPSET, DOMAIN: VERSION},
        name="model",
    )
    model = ir.Model(graph, ir_version=10, functions=list(writer.functions.values()))
    folder.mkdir(exist_ok=True)
    ir.save(model, folder / "model.onnx", external_data="model.onnx.data", size_threshold_bytes=0)
    return folder / "model.onnx"


def open_session(path: Path, *, num_slots: int = 4, num_pages: int = 30, bound: bool = True) -> Session:
    return Session(path, num_slots=num_slots, num_pages=num_pages, bound=bound, threads=1)


def profile_of(session: Session, *, max_tokens: int = 16) -> Profile:
    return Profile("onnx", "model.onnx", max_tokens, session.num_slots - 1, 64, session.page_size)


def int32(*values: int) -> np.ndarray:
    return np.asarray(values, dtype=np.int32)


def one_sequence(
    tokens: Sequence[int], *, context: int = 0, slot: int = 1, pages: Sequence[int] = (1, 2, 3)
) -> StepInputs:
    """A step of one sequence that wants its last token's logits."""
    return StepInputs(
        np.asarray(tokens, dtype=np.int64),
        int32(0, len(tokens)),
        int32(context),
        int32(slot),
        int32(*pages)[None],
        int32(len(tokens) - 1),
    )
