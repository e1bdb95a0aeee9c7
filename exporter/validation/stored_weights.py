"""Whether every weight of a graph is, bit for bit, what the checkpoint's tensors convert to.

Each tensor is read and converted again, by the code that fills PyTorch and not by the code that wrote the graph's file.
Memory is bounded by a piece of a tensor for each core.
"""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
import onnx_ir as ir
import torch
from numpy.typing import NDArray

from nemotrt.exporter.checkpoint import weights
from nemotrt.exporter.checkpoint.loaded_model import LoadedModel
from nemotrt.exporter.config import BuildConfig
from nemotrt.exporter.environment import num_cores
from nemotrt.exporter.progress import Advance, Progress, ignore
from nemotrt.exporter.report.model import Gate, Metric, NotCompared, Omitted, ValidationReport
from nemotrt.exporter.runtime import files
from nemotrt.exporter.runtime.graph_file import OnnxGraph
from nemotrt.exporter.stages.quantize import WeightToQuantize, weights_to_quantize
from nemotrt.model.checkpoint import tensor_sources
from nemotrt.model.config import ModelConfig
from nemotrt.model.hybrid import NemotronH
from nemotrt.plugins.contract import DType

WEIGHTS = "weights"
"""The scenario in which weights are compared with the checkpoint."""

Bytes = NDArray[np.uint8]

Pieces = Callable[[], Iterator[Bytes]]
"""Reads a weight's bytes, piece by piece in order."""


class ExpectedWeight(NamedTuple):
    """A weight that the graph must have."""

    shape: tuple[int, ...]
    dtype: DType
    pieces: Pieces | None
    """None for what only the calibration of a build determined."""

    @property
    def length(self) -> int:
        """Bytes."""
        return math.prod(self.shape) * self.dtype.itemsize


def with_weights(
    report: ValidationReport,
    graph: OnnxGraph,
    expected: Mapping[str, ExpectedWeight],
    progress: Progress,
) -> ValidationReport:
    """The report with the gates of `compare_weights`, and the weights that the checkpoint does not determine."""
    total = sum(weight.length for weight in expected.values())
    what = "graph against checkpoint, bit for bit"
    with progress.stage(WEIGHTS, what, total=total, is_bytes=True) as advance:
        gates = (*report.gates, *compare_weights(graph, expected, advance=advance))
    calibrated = [name for name, weight in expected.items() if weight.pieces is None]
    if not calibrated:
        return replace(report, gates=gates)
    what = f"{len(calibrated)} scales that the build's calibration determined, such as {calibrated[0]}"
    not_compared = (*report.not_compared, NotCompared(Omitted.CHECKPOINT, what))
    return replace(report, gates=gates, not_compared=not_compared)


def compare_weights(
    graph: OnnxGraph, expected: Mapping[str, ExpectedWeight], *, advance: Advance = ignore
) -> tuple[Gate, Gate]:
    """The gates on weights that differ from the checkpoint's, and on values that no tensor of it accounts for.

    A weight also differs if the graph does not read it, or computes another value from it without a step's inputs.
    `advance` counts the bytes of the expected weights. Raises CheckpointError on a damaged checkpoint.
    """
    initializers = graph.model.graph.initializers
    tensors = {name: value.const_value for name, value in initializers.items()}
    changed = _not_read_as_stored(graph.model.graph)
    pool = ThreadPoolExecutor(num_cores())
    try:
        are_equal = pool.map(lambda name: _is_equal(tensors.get(name), expected[name]), expected)
        differing = []
        for (name, weight), is_equal in zip(expected.items(), are_equal, strict=True):
            differing += [] if is_equal and name not in changed else [name]
            advance(weight.length)
    finally:
        pool.shutdown(cancel_futures=True)
    tensors |= _constants(graph.model.graph)
    others = [name for name, tensor in tensors.items() if name not in expected and not _is_derived(tensor)]
    return _gate(Metric.WEIGHT, differing), _gate(Metric.NOT_STORED, others)


def _gate(metric: Metric, names: Sequence[str]) -> Gate:
    return Gate(WEIGHTS, names[0] if names else "all", metric, float(len(names)), 0.0)


def _not_read_as_stored(graph: ir.Graph) -> set[str]:
    """The weights that no node reads, or that a node reads with nothing but weights and constants.

    Only a weight in FP8 may be widened by its own scale before a node reads it with values of the step.
    """
    sources: dict[ir.Value, tuple[str, ...]] = {
        value: (str(value.name),) for value in graph.initializers.values()
    }
    changed = {str(value.name) for value in sources if not value.uses()}
    for node in graph:
        inputs = [value for value in node.inputs if value]
        if not sources.keys() >= set(inputs):
            continue
        names = tuple(name for value in inputs for name in sources[value])
        sources |= dict.fromkeys(node.outputs, names)
        if node.op_type != "DequantizeLinear" or names != (names[0], f"{names[0]}_scale"):
            changed.update(names)
    return changed


def _constants(graph: ir.Graph) -> dict[str, ir.TensorProtocol | None]:
    """The values of Constant nodes; None for one that is not stored as a tensor."""
    return {
        str(node.outputs[0].name): value.as_tensor() if (value := node.attributes.get("value")) else None
        for node in graph
        if node.op_type == "Constant"
    }


def _is_derived(tensor: ir.TensorProtocol | None) -> bool:
    """Whether the exporter derives the value from the configuration: sizes for Reshape and Split, or a scale of 1.

    A norm without weights has the scale 1: the gated norm of a Mamba layer multiplies by its weight afterwards.
    """
    if tensor is None or isinstance(tensor, ir.ExternalTensor):
        return False
    return tensor.dtype is ir.DataType.INT64 or bool((tensor.numpy() == 1).all())


def _is_equal(tensor: ir.TensorProtocol | None, expected: ExpectedWeight) -> bool:
    """Whether a tensor of the graph has the expected dtype, shape and bytes; its bytes must be in a file of weights."""
    if not isinstance(tensor, ir.ExternalTensor) or not Path(tensor.path).is_file():
        return False
    if tensor.dtype != expected.dtype.onnx or tuple(tensor.shape.numpy()) != expected.shape:
        return False
    if expected.pieces is None:
        return True
    position = tensor.offset or 0
    end = position + expected.length
    with Path(tensor.path).open("rb", buffering=0) as file:
        for piece in expected.pieces():
            stored = np.empty_like(piece)
            count = files.read_into(stored.data, file.fileno(), position)
            if count != len(piece) or not np.array_equal(stored, piece):
                return False
            position += count
    return position == end and tensor.length == expected.length


def expected_weights(
    model: LoadedModel, config: BuildConfig, base: LoadedModel | None = None
) -> dict[str, ExpectedWeight]:
    """The weights of the model's graph by name, with the bytes that the checkpoint gives; tied weights appear once.

    With `base`, the model before a build quantized it, its weights are quantized here once more.
    """
    network = NemotronH(model.config, dtype=config.dtype.torch, device="meta")
    quantized = _quantized_weights(model.config, base) if base else {}
    expected = {}
    for name, parameter in network.named_parameters():
        shape, dtype = tuple(parameter.shape), DType.from_torch(parameter.dtype)
        pieces: Pieces | None = partial(_converted, base or model, name, shape, dtype)
        expected[name] = ExpectedWeight(shape, dtype, quantized.get(name, pieces))
    return expected


def _converted(model: LoadedModel, name: str, shape: tuple[int, ...], dtype: DType) -> Iterator[Bytes]:
    for piece in weights.values(model.weights[name], shape, dtype):
        yield piece.view(torch.uint8).numpy()


def _quantized_weights(config: ModelConfig, base: LoadedModel) -> dict[str, Pieces | None]:
    """The weights and scales that a build adds or replaces in the model `base`; None for scales of activations."""
    # A build gives each output of an expert a scale of its own.
    recipe = replace(config.recipe, per_channel=config.recipe.modules)
    made = {
        f"{weight.module}.{kind}": (weight, position)
        for group in weights_to_quantize(base, recipe).values()
        for weight in group
        for position, kind in enumerate(("weight", "weight_scale"))
    }
    before = tensor_sources(base.config)
    pieces: dict[str, Pieces | None] = {}
    for name, source in tensor_sources(config).items():
        stored = [aliases[0] for aliases in source.names]
        if stored and made.keys() >= set(stored):
            pieces[name] = partial(_quantized, [made[one] for one in stored])
        elif source != before.get(name):
            pieces[name] = None
    return pieces


def _quantized(made: Sequence[tuple[WeightToQuantize, int]]) -> Iterator[Bytes]:
    for weight, position in made:
        for piece in weight.entries()[position].pieces():
            yield np.frombuffer(piece, np.uint8)
