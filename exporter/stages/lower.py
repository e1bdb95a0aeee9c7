"""Lower: the traced parts as one ONNX graph with one node an op, its weights streamed beside it.

How an op is lowered: its node in `plugins/onnx_op.py`, its meaning in `plugins/<op>/onnx_body.py`; every other
operator in `exporter/aten_to_onnx.py`. Needs no model in memory: a weight passes through in pieces.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import onnx
import onnx_ir as ir
from torch.export.graph_signature import InputKind

from nemotrt.exporter.artifacts import LoweredGraph, TracedModel, TracedPart
from nemotrt.exporter.checkpoint.loaded_model import LoadedModel
from nemotrt.exporter.errors import LowerError
from nemotrt.exporter.lowering import external_data
from nemotrt.exporter.lowering.aten_to_onnx import DTYPES, Constants, Translator
from nemotrt.exporter.lowering.external_data import Placed
from nemotrt.exporter.progress import Advance, ignore
from nemotrt.plugins import onnx_op
from nemotrt.plugins.contract import PoolSpec
from nemotrt.plugins.spec import DOMAIN, VERSION, OpSpec

IR_VERSION = 10
"""Older than opset 23 (released with 11): the newest that every reader we target accepts, and all the graph needs."""

STEP_INPUTS = {
    "input_ids": (ir.DataType.INT64, ("T",)),
    "query_start": (ir.DataType.INT32, ("B+1",)),
    "context_len": (ir.DataType.INT32, ("B",)),
    "slot": (ir.DataType.INT32, ("B",)),
    "page_table": (ir.DataType.INT32, ("B", "M")),
    "logits_row": (ir.DataType.INT32, ("R",)),
}
"""The graph's inputs that say what a step is; the pools follow them."""

OPS_OF_KIND = {
    "mamba": ("NemoCausalConv1d", "NemoSelectiveScan"),
    "attention": ("NemoPagedAttention",),
    "moe": ("NemoMoeDispatch",),
    "mlp": (),
}
"""Which ops a layer of each kind must become."""


@dataclass(frozen=True)
class Streaming:
    """How weights get to the graph."""

    link: bool = False
    """Leave what the checkpoint holds as it is wanted in its files, and link those to the graph's folder."""
    done: int = 0
    """Bytes of the data file that a build before this one has brought to the disk."""
    advance: Advance = ignore
    """Hears of weight bytes that passed."""
    keep: Callable[[int], None] = ignore
    """Hears of how many bytes of the data file are on the disk."""


def lower(
    model: LoadedModel, traced: TracedModel, path: Path, streaming: Streaming | None = None
) -> LoweredGraph:
    """The graph at `path` and its data beside it.

    Raises LowerError when the graph is not what the configuration says, CheckpointError on a weight's value.
    """
    writer = _GraphWriter(traced)
    for part in traced.parts:
        writer.write(part)
    leftover = _leftover(model, writer.parameters)
    if leftover:
        raise LowerError(f"{leftover[0]} has no place in the graph")
    placed, written = _stream(model, writer.parameters, path, streaming or Streaming())
    graph = writer.graph()
    counts = Counter(node.op_type for node in graph.graph if node.domain == DOMAIN)
    _save(graph, path)
    shards = {one.linked for one in placed if one.linked is not None}
    _check(path, model, counts, {shard.name for shard in shards})
    for shard in sorted(shards):
        external_data.link(shard, path.parent)
    return LoweredGraph(
        path=path,
        nodes=len(graph.graph),
        ops=dict(counts),
        weight_bytes=sum(one.length for one in placed),
        written_bytes=written,
        linked=tuple(sorted(shard.name for shard in shards)),
    )


def value_names(traced: TracedModel) -> list[dict[str, str]]:
    """For each part, the names of its traced nodes → those of their values in the graph that `lower` makes of it."""
    writer = _GraphWriter(traced)
    for part in traced.parts:
        writer.write(part)
    writer.graph()  # gives the outputs their names
    return [translator.names() for translator in writer.translators]


class _GraphWriter:
    """Collects nodes, inputs, parameters and op forms, part by part."""

    def __init__(self, traced: TracedModel) -> None:
        self._traced = traced
        self.step = {name: ir.val(name, dtype, axes) for name, (dtype, axes) in STEP_INPUTS.items()}
        self.pools = {pool.name: _pool_value(pool, pool.name) for pool in traced.pools}
        self.parameters: dict[str, ir.Value] = {}
        self._next: dict[str, ir.Value] = {}
        self._nodes: list[ir.Node] = []
        self.translators: list[Translator] = []
        self._constants = Constants()
        self._functions: dict[str, tuple[ir.Function, Any]] = {}
        self._flow = self.step["input_ids"]

    def write(self, part: TracedPart) -> None:
        """Write one part; the tokens' values flow in from the part before it, as its first input."""
        sources = iter([self._flow, *(self.pools[pool.name] for pool in part.pools)])
        recorded = {
            node.name: node.meta["val"] for node in part.program.graph.nodes if node.op == "placeholder"
        }
        placeholders: dict[str, ir.Value] = {}
        symbols: dict[str, str] = {}
        for spec in part.program.graph_signature.input_specs:
            name = spec.arg.name
            if spec.kind is not InputKind.USER_INPUT:
                placeholders[name] = self._parameter(part.parameters[str(spec.target)])
                continue
            # PyTorch flattens `step.slot` to `step_slot`.
            placeholders[name] = self.step.get(name.removeprefix("step_")) or next(sources)
            symbols |= _symbols(recorded[name].shape, placeholders[name])
        translator = Translator(part.prefix, symbols, self._constants)
        results = translator.translate(part.program.graph, placeholders)
        self._nodes += translator.nodes
        self.translators.append(translator)
        self._flow = results[0]
        for pool, value in zip(part.pools, results[1:], strict=True):
            self._next[pool.name] = value
        for form in translator.forms:
            self._define(*form)

    def _parameter(self, name: str) -> ir.Value:
        if name not in self.parameters:
            recorded = self._traced.parameters[name]
            self.parameters[name] = ir.val(name, DTYPES[recorded.dtype], list(recorded.shape))
        return self.parameters[name]

    def _define(self, spec: OpSpec, sizes: Mapping[str, Any], attributes: Mapping[str, Any]) -> None:
        """One function an op: its body is written for the sizes and attributes that all its nodes share."""
        form = ({axis: size for axis, size in sizes.items() if isinstance(size, int)}, dict(attributes))
        known = self._functions.get(spec.name)
        if known is None:
            self._functions[spec.name] = (onnx_op.function(spec, sizes, attributes), form)
        elif known[1] != form:
            raise LowerError(
                f"{spec.name} stands in two forms: {known[1]} and {form}",
                hint="layers of one kind must have the same sizes",
            )

    def graph(self) -> ir.Model:
        """The whole model; every pool's output is named for what it replaces."""
        self._flow.name = "logits"
        for pool in self._traced.pools:
            self._next[pool.name].name = f"next.{pool.name}"
        inputs = [*self.step.values(), *self.pools.values()]
        used = {value for node in self._nodes for value in node.inputs}
        graph = ir.Graph(
            [value for value in inputs if value in used],
            [self._flow, *(self._next[pool.name] for pool in self._traced.pools)],
            nodes=self._nodes,
            initializers=[*self.parameters.values(), *self._constants.values.values()],
            opset_imports={"": onnx_op.OPSET, DOMAIN: VERSION},
            name="nemotron_h",
        )
        functions = [function for function, _ in self._functions.values()]
        return ir.Model(graph, ir_version=IR_VERSION, producer_name="nemo-export", functions=functions)


def _symbols(sizes: Sequence[Any], value: ir.Value) -> dict[str, str]:
    """PyTorch's symbols for an input's sizes → the contract's names of its axes."""
    assert value.shape is not None
    named = zip(sizes, value.shape, strict=True)
    return {str(size): str(axis.value) for size, axis in named if isinstance(axis, ir.SymbolicDim)}


def _pool_value(pool: PoolSpec, name: str) -> ir.Value:
    return ir.val(name, ir.DataType(pool.dtype.onnx), [pool.axis, *pool.row_shape])


def _leftover(model: LoadedModel, placed: Mapping[str, ir.Value]) -> list[str]:
    """Parameters that the graph does not have, but for those whose tensors it has under another name (tied)."""
    shared = {model.weights[name].tensors for name in placed} - {()}
    return sorted(
        name for name, source in model.weights.items() if name not in placed and source.tensors not in shared
    )


def _stream(
    model: LoadedModel, parameters: Mapping[str, ir.Value], path: Path, streaming: Streaming
) -> tuple[tuple[Placed, ...], int]:
    """Write the parameters to the data file, or leave them in the checkpoint's; each initialiser says where it is.

    Gives where they are, and the bytes written.
    """
    torch_dtypes = {ir_dtype: dtype for dtype, ir_dtype in DTYPES.items()}
    wanted = []
    for name, value in parameters.items():
        assert value.dtype is not None
        assert value.shape is not None
        shape = tuple(int(size) for size in value.shape.numpy())
        wanted.append((model.weights[name], shape, torch_dtypes[value.dtype]))
    placed = external_data.lay_out(wanted, link=streaming.link)
    target = external_data.data_path(path)
    written = external_data.write(
        target, placed, done=streaming.done, advance=streaming.advance, keep=streaming.keep
    )
    for (name, value), one in zip(parameters.items(), placed, strict=True):
        file = one.linked.name if one.linked else target.name
        value.const_value = ir.ExternalTensor(
            file,
            one.offset,
            one.length,
            DTYPES[one.dtype],
            shape=ir.Shape(one.shape),
            name=name,
            base_dir=path.parent,
        )
    return placed, written


def _save(model: ir.Model, path: Path) -> None:
    proto = ir.to_proto(model)
    path.write_bytes(proto.SerializeToString(deterministic=True))


def _check(path: Path, model: LoadedModel, counts: Mapping[str, int], linked: set[str]) -> None:
    """Refuse a graph that is not what the configuration says, or that ONNX itself would refuse."""
    expected = Counter(op for kind in model.config.layers for op in OPS_OF_KIND[kind])
    if dict(expected) != dict(counts):
        raise LowerError(f"the graph has {dict(counts)}, the configuration asks for {dict(expected)}")
    graph = onnx.load(path, load_external_data=False)
    try:
        with _data_in_one_file(path, graph, linked) as checked:
            onnx.checker.check_model(str(checked))
        # Every value carries the shape that PyTorch recorded: strict inference fails where ONNX finds another.
        onnx.shape_inference.infer_shapes(graph, strict_mode=True)
    except (onnx.checker.ValidationError, onnx.shape_inference.InferenceError) as error:
        raise LowerError(f"ONNX refuses the graph: {str(error).splitlines()[0]}") from error


@contextmanager
def _data_in_one_file(path: Path, graph: onnx.ModelProto, linked: set[str]) -> Iterator[Path]:
    """The graph, or for ONNX's checker, which takes no file with a second hard link, one that names the data file only.

    Where each tensor lies is known from its own header; the checker looks whether there is a file.
    """
    if not linked:
        yield path
        return
    stand_in = onnx.ModelProto()
    stand_in.CopyFrom(graph)
    for tensor in stand_in.graph.initializer:
        for entry in tensor.external_data:
            if entry.key == "location" and entry.value in linked:
                entry.value = external_data.data_path(path).name
    checked = path.with_name(f".{path.name}.checked")
    try:
        checked.write_bytes(stand_in.SerializeToString())
        yield checked
    finally:
        checked.unlink(missing_ok=True)
