"""What a build will need, from headers alone: no tensor is read.

Bytes written are exact but for the graph itself. Memory and time are measured constants, by which
`python scripts/estimates.py` finds each stage's estimate within a quarter of what then happens: memory is anonymous,
without the pages of mapped files, which go when it is short; time is of one core of the machine of docs/performance.md.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from nemotrt.exporter.checkpoint.loaded_model import LoadedModel, WeightSource
from nemotrt.exporter.checkpoint.safetensors_reader import StoredTensor
from nemotrt.exporter.config import COMPUTE_DTYPES
from nemotrt.exporter.environment import memory_bytes, num_cores
from nemotrt.exporter.errors import CompileError, UsageError
from nemotrt.model.config import ModelConfig

if TYPE_CHECKING:
    from nemotrt.exporter.lowering.external_data import Placed

BYTES = {"fp32": 4, "fp16": 2, "bf16": 2, "fp8": 1}

BASE_MEMORY = 500_000_000
"""PyTorch and the traced graphs, without weights."""

RUNNER_MEMORY = 1.3
"""Of a reference's weights, with what its steps need."""

LOGITS_ROWS = 511
"""Rows of logits that a validation keeps for each runner, as float64."""
LOGITS_COPIES = 6
"""Four runners', and those that the gates work on."""

PART_BYTES = {"fp32": 8, "fp16": 12, "bf16": 12, "fp8": 12}
"""Of a parameter of a part that is compared alone: PyTorch's in FP32, the floor's, the graph's, and its FP32 twin's."""
EXPERT_COPIES = 2
"""Of the experts, which no one widens as a whole: PyTorch's stack, and the graph's own bytes."""
PART_ROWS = 159
"""Rows of logits that the head alone gives."""

CALIBRATION_TOKENS, STEP_TOKENS = 3000, 1024
"""Of the built-in text, and those that pass a layer at once."""

ENGINE_MEMORY = 200_000_000
"""Of TensorRT-RTX 1.7, beside the engine that it builds in memory; the graph's weights are mapped."""
ENGINE_FILES = 15_000_000
"""Bytes of the plugin library and of what TensorRT says of an engine."""

LOAD_MEMORY, TENSOR_MEMORY = 25_000_000, 800
"""Of the program, and of each tensor of the checkpoint, of which half stays; writing takes the other half again."""
TRACE_MEMORY, LOWER_MEMORY = 275_000_000, 15_000_000
"""Of PyTorch with the traced graphs, and what writing weights adds."""
GRAPH_FILE, GRAPH_LAYER = 35_000, 8_000
"""Bytes of the graph without weights: the ops' bodies, and each layer's nodes."""

LOAD_SECONDS, TENSOR_SECONDS = 0.05, 10e-6
"""CPU seconds of reading a checkpoint's headers, and for each of its tensors."""
QUANTIZE_MEMORY, ACTIVATIONS = 190_000_000, 22
"""Of PyTorch; and what a layer computes with, in rows of the hidden size in FP32 for each token of a step."""
QUANTIZE_BASE, EXPERT_SECONDS, CALIBRATE_SECONDS, QUANTIZE_SECONDS = 1.4, 0.013, 36e-12, 6.5e-9
"""CPU seconds of PyTorch's start, for each expert, for each token and parameter that it passes, and for each
parameter."""
IMPORT_SECONDS = 1.25
"""CPU seconds in which PyTorch and ONNX are loaded, in the trace."""
KIND_SECONDS = 0.07
"""And for each kind of layer that is traced."""
LOWER_SECONDS, LAYER_SECONDS = 0.04, 0.005
"""CPU seconds of the graph's bodies, and of each layer's nodes."""
READ_SECONDS, WRITE_SECONDS, CAST_SECONDS = 0.19e-9, 0.31e-9, 0.16e-9
"""CPU seconds a byte of weights: read and judged; written; and written of those that change their dtype."""
PIECE_BYTES, PIECE_SECONDS = 4 << 20, 45e-6
"""What is read and written at once, and CPU seconds for each and for each tensor, a hole too."""
BUNDLE_SECONDS, HASH_SECONDS = 0.15, 0.62e-9
"""CPU seconds of the report's pages, and for each byte that is hashed."""
BUNDLE_MEMORY = 70_000_000
"""What stays of a validation."""
VALIDATE_SECONDS = {"fp32": 0.13e-6, "fp16": 0.21e-6, "bf16": 0.21e-6, "fp8": 0.21e-6}
"""CPU seconds a parameter, and VALIDATE_BASE for the steps themselves: of a dense model and one of experts."""
VALIDATE_BASE = 6.0
KERNELS, KERNEL_SECONDS, LINK_SECONDS = 48, 0.27, 5.0
"""Kernels of one SM and dtype, CPU seconds for each that is not in the cache, and those of linking them."""
WORKER_MEMORY = 200_000_000
"""Of a process that compiles kernels, one a core."""
ENGINE_BASE_SECONDS, ENGINE_SECONDS = 1.4, 4.6e-9
"""CPU seconds of TensorRT-RTX's builder, and for each byte of weights."""

WITHOUT_WHOLE_STEPS = (
    "--no-validate builds without it; then nemo-export validate --layers-alone takes a layer at a time"
)
"""What to do where a validation does not fit."""


@dataclass(frozen=True)
class StageEstimate:
    """What one stage needs: bytes of memory at its peak, bytes written to disk, and CPU seconds."""

    stage: str
    memory_bytes: int
    disk_bytes: int
    cpu_seconds: float
    runtime: str = ""
    """The only runtime whose builds have it; empty where all have."""


@dataclass(frozen=True)
class Quantizing:
    """What making an FP8 checkpoint depends on, which a build begins with where its own is none."""

    active_parameters: int
    """Of the layers, those that a token passes."""
    num_experts: int
    """Of all layers."""
    memory_bytes: int
    """Of the largest part that is in memory at once, with what it computes with."""
    written_bytes: int


@dataclass(frozen=True)
class Work:
    """What the cost of a build depends on; bytes are those of weights."""

    num_tensors: int
    num_built: int
    """Tensors that the graph is built from: with the scales of those that are quantized before."""
    layers: tuple[str, ...]
    parameters: int
    vocab_size: int
    precision: str
    graph_bytes: int
    read_bytes: int
    """Without holes of a sparse checkpoint, as the two below."""
    written_bytes: int
    """To the graph's data file, what fills its pages included."""
    cast_bytes: int
    """Of them, those that are stored in another dtype."""
    bundle_bytes: int
    """Of the files with weights in the bundle, the linked ones as a whole."""
    quantizing: Quantizing | None
    engines: Mapping[str, int]
    """Runtimes whose engines can be built → SMs for which kernels are to be compiled before that."""


def work(
    config: ModelConfig,
    sources: Mapping[str, WeightSource],
    num_tensors: int,
    precision: str,
    *,
    link: bool,
    is_stored: bool,
    engines: Mapping[str, int],
) -> Work:
    """What a build of the sources has to do; `is_stored` if the files that they name are there to be looked at."""
    import torch

    from nemotrt.exporter.checkpoint import weights
    from nemotrt.exporter.lowering import external_data

    placed = external_data.lay_out(
        weights.wanted(config, sources, getattr(torch, COMPUTE_DTYPES[precision])), link=link
    )
    own = [one for one in placed if one.linked is None]
    changed = [one for one in own if any(getattr(torch, t.dtype) != one.dtype for t in one.source.tensors)]
    quantized = [one for one in changed if one.dtype.itemsize == BYTES["fp8"]]
    cast = [one for one in changed if one.dtype.itemsize != BYTES["fp8"]]
    linked = {one.linked for one in placed if one.linked is not None}
    count = external_data.num_real if is_stored else _length
    return Work(
        num_tensors=num_tensors,
        num_built=num_tensors + 2 * sum(len(one.source.tensors) for one in quantized),
        layers=config.layers,
        parameters=num_parameters(tensor for source in sources.values() for tensor in source.tensors),
        vocab_size=config.vocab_size,
        precision=precision,
        graph_bytes=_length(placed),
        read_bytes=count(placed),
        written_bytes=count(own) + external_data.end_of(own) - _length(own),
        cast_bytes=count(cast),
        bundle_bytes=external_data.end_of(placed) + sum(path.stat().st_size for path in linked if is_stored),
        quantizing=_quantizing(config, sources, quantized) if quantized else None,
        engines=engines,
    )


def _quantizing(
    config: ModelConfig, sources: Mapping[str, WeightSource], quantized: Iterable[Placed]
) -> Quantizing:
    """Of a model whose `quantized` weights become FP8; stacks of experts and embeddings are held as they are stored."""
    used = config.num_experts_per_tok / max(1, config.n_routed_experts)
    activations = 4 * config.hidden_size * ACTIVATIONS * STEP_TOKENS
    active, written = 0.0, 0
    parts: dict[str, int] = {}
    for name, source in sources.items():
        count, place, length = num_parameters(source.tensors), _place(name), _stored_length(source)
        written += length
        if place != "head":
            is_as_stored = _is_expert(name) or place == "embeddings"
            parts.setdefault(place, 0 if place == "embeddings" else activations)
            parts[place] += length if is_as_stored else 4 * count
        if place.startswith("layers."):
            active += count * (used if _is_expert(name) else 1)
    written -= sum(_stored_length(one.source) - one.length for one in quantized)
    return Quantizing(
        active_parameters=int(active),
        num_experts=config.layers.count("moe") * config.n_routed_experts,
        memory_bytes=max(parts.values()) + 4 * config.hidden_size * CALIBRATION_TOKENS,
        written_bytes=written,
    )


def _stored_length(source: WeightSource) -> int:
    return sum(tensor.length for tensor in source.tensors)


def _place(name: str) -> str:
    """The part that a parameter belongs to: `layers.7`, `embeddings` or `head`."""
    found = re.match(r"backbone\.(layers\.\d+|embeddings)\.", name)
    return found[1] if found else "head"


def _is_expert(name: str) -> bool:
    return name.endswith((".experts.up", ".experts.down"))


def _length(placed: Iterable[Placed]) -> int:
    return sum(one.length for one in placed)


def num_parameters(tensors: Iterable[StoredTensor]) -> int:
    """Elements of all tensors together."""
    return sum(math.prod(tensor.shape) for tensor in tensors)


def graph_bytes(model: LoadedModel, precision: str) -> int:
    """Bytes of the graph's weights, the FP32 ones counted as the others: they are a few rows each."""
    return _parameters_of(model) * BYTES[precision]


def check_memory(model: LoadedModel, *, hint: str, copies: float = 1.0) -> None:
    """Raise UsageError when so many copies in PyTorch, in FP32, need more memory than there is."""
    parameters = int(copies * _parameters_of(model))
    wanted, there = _validate_memory(parameters, model.config.vocab_size), memory_bytes()
    if wanted > there:
        raise UsageError(
            f"the comparison with PyTorch needs about {wanted / 1e9:.3g} GB of memory,"
            f" this machine has {there / 1e9:.3g} GB",
            hint=hint,
        )


def check_part_memory(model: LoadedModel, precision: str) -> None:
    """Raise UsageError when comparing the largest part with PyTorch, alone, needs more memory than there is."""
    parts: dict[str, int] = {}
    for name, weight in model.weights.items():
        place = _place(name)
        per_parameter = EXPERT_COPIES * BYTES[precision] if _is_expert(name) else PART_BYTES[precision]
        parts[place] = parts.get(place, 0) + per_parameter * num_parameters(weight.tensors)
    parts["head"] += LOGITS_COPIES * PART_ROWS * model.config.vocab_size * 8
    largest = max(parts, key=lambda place: parts[place])
    wanted, there = BASE_MEMORY + parts[largest], memory_bytes()
    if wanted > there:
        raise UsageError(
            f"comparing {largest} alone with PyTorch needs about {wanted / 1e9:.3g} GB of memory,"
            f" this machine has {there / 1e9:.3g} GB",
            hint="use a machine with more",
        )


def _parameters_of(model: LoadedModel) -> int:
    return num_parameters(tensor for weight in model.weights.values() for tensor in weight.tensors)


def num_references(precision: str, layers: Sequence[str]) -> float:
    """Copies of the weights in FP32 that a validation has side by side.

    With experts, the model whose loss is measured stays, at half the size, beside a reference on its choices.
    """
    return 1.5 if precision != "fp32" and "moe" in layers else 1.0


def _validate_memory(parameters: float, vocab_size: int) -> int:
    logits = LOGITS_COPIES * LOGITS_ROWS * vocab_size * 8
    return int(BASE_MEMORY + RUNNER_MEMORY * 4 * parameters + logits)


def engine_memory(weight_bytes: int) -> int:
    """Bytes that the builder of an engine with so many bytes of weights has at its peak, the mapped graph left out."""
    return ENGINE_MEMORY + weight_bytes


def check_engine_memory(weight_bytes: int) -> None:
    """Raise CompileError when building the engine needs more memory than there is."""
    wanted, there = engine_memory(weight_bytes), memory_bytes()
    if wanted > there:
        raise CompileError(
            f"building the engine needs about {wanted / 1e9:.3g} GB of memory, this machine has {there / 1e9:.3g} GB",
            hint="--runtime onnx builds the bundle without engines",
        )


def stages(work: Work) -> tuple[StageEstimate, ...]:
    """Each stage of a build, in order."""
    read, tensors = TENSOR_MEMORY * work.num_tensors, TENSOR_MEMORY * work.num_built
    lower = tensors + TRACE_MEMORY + LOWER_MEMORY
    bundle = lower + BUNDLE_MEMORY
    num_layers, kinds = len(work.layers), len(set(work.layers))
    written = work.written_bytes + GRAPH_FILE + GRAPH_LAYER * num_layers
    streamed = (
        PIECE_SECONDS * (work.num_built + work.graph_bytes / PIECE_BYTES)
        + READ_SECONDS * work.read_bytes
        + WRITE_SECONDS * work.written_bytes
        + CAST_SECONDS * work.cast_bytes
    )
    bundles = [
        ("", work.bundle_bytes),
        *((runtime, work.bundle_bytes + work.graph_bytes) for runtime in work.engines),
    ]
    return (
        StageEstimate("load", LOAD_MEMORY + read, 0, LOAD_SECONDS + TENSOR_SECONDS * work.num_tensors),
        *_quantize_stage(work.quantizing, work.parameters),
        StageEstimate("trace", tensors // 2 + TRACE_MEMORY, 0, IMPORT_SECONDS + KIND_SECONDS * kinds),
        StageEstimate("lower", lower, written, LOWER_SECONDS + LAYER_SECONDS * num_layers + streamed),
        *(
            stage
            for runtime, sms in work.engines.items()
            for stage in _engine_stages(work, runtime, sms, lower)
        ),
        StageEstimate(
            "validate",
            _validate_memory(work.parameters * num_references(work.precision, work.layers), work.vocab_size),
            0,
            VALIDATE_BASE + VALIDATE_SECONDS[work.precision] * work.parameters,
        ),
        *(
            StageEstimate("bundle", bundle, 0, BUNDLE_SECONDS + HASH_SECONDS * hashed, runtime)
            for runtime, hashed in bundles
        ),
    )


def _quantize_stage(work: Quantizing | None, parameters: int) -> Iterator[StageEstimate]:
    if work:
        seconds = (
            QUANTIZE_BASE
            + EXPERT_SECONDS * work.num_experts
            + CALIBRATE_SECONDS * CALIBRATION_TOKENS * work.active_parameters
            + QUANTIZE_SECONDS * parameters
        )
        yield StageEstimate("quantize", QUANTIZE_MEMORY + work.memory_bytes, work.written_bytes, seconds)


def _engine_stages(work: Work, runtime: str, num_sms: int, memory: int) -> tuple[StageEstimate, ...]:
    """Of a process that has so much memory itself. No kernel of an SM without a library is taken to be in the cache."""
    kernels = KERNELS * num_sms * (2 if work.precision == "fp8" else 1)
    workers = WORKER_MEMORY * num_cores() if kernels else 0
    seconds = KERNEL_SECONDS * kernels + LINK_SECONDS if kernels else 0
    engine = work.graph_bytes
    return (
        StageEstimate("kernels", memory + workers, 0, seconds, runtime),
        StageEstimate(
            "compile",
            memory + engine_memory(engine),
            engine + ENGINE_FILES,
            ENGINE_BASE_SECONDS + ENGINE_SECONDS * engine,
            runtime,
        ),
    )
