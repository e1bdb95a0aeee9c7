"""Memory, disk space and time that a build needs, computed from sizes alone.

No tensor is read. Bytes written are exact except for the graph's nodes. Memory is anonymous memory: pages of mapped
files do not count, because the system drops them when memory is short. Time is an order of magnitude.
`python scripts/estimates.py` compares all three with a real build.
"""

from __future__ import annotations

import dataclasses
import math
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from nemotrt.exporter.checkpoint.loaded_model import LoadedModel, WeightSource, stored_parameters
from nemotrt.exporter.config import BuildConfig
from nemotrt.exporter.engines.shape_profiles import COMPARED_ROWS
from nemotrt.exporter.environment import memory_bytes, num_cores
from nemotrt.exporter.errors import CompileError, ExportError, UsageError
from nemotrt.exporter.lowering import data_layout
from nemotrt.exporter.lowering.data_layout import Placed
from nemotrt.exporter.runtime.step import pages_of
from nemotrt.model.checkpoint import tensor_sources
from nemotrt.model.config import ModelConfig
from nemotrt.model.recipe import EXPERTS
from nemotrt.model.step import pool_specs
from nemotrt.plugins.contract import EMBEDDINGS, HEAD, DType, LayerName

WEIGHT_BYTES = {"fp32": 4, "fp16": 2, "bf16": 2, "fp8": 1}

# Memory, in bytes
LOAD_MEMORY, TORCH_MEMORY, PROGRAM_MEMORY, BUNDLE_MEMORY = 40_000_000, 290_000_000, 430_000_000, 650_000_000
"""The program before and after it imports PyTorch, after it traces the graph, and after a validation in ONNX Runtime.

PyTorch's CUDA build is assumed: its libraries take 130 MB more than those of the CPU build.
"""
TENSOR_MEMORY = 800
"""Description of one stored tensor."""
ZEROS_MEMORY = 5_000_000
"""Of each thread that searches for zero rows."""
QUANTIZE_MEMORY, ENGINE_MEMORY, KERNEL_WORKER_MEMORY = 190_000_000, 200_000_000, 200_000_000
"""PyTorch during calibration; TensorRT-RTX 1.7 in addition to the engine; a process that compiles kernels."""
VALIDATION_MEMORY, WEIGHTS_IN_FP32 = 500_000_000, 1.3 * 4
"""PyTorch with both graphs; bytes for each parameter of a reference in FP32, its steps' memory included."""
PART_BYTES = {"fp32": 8, "fp16": 12, "bf16": 12, "fp8": 12}
"""Bytes for each parameter of a part that is compared alone: PyTorch's in FP32, the rounding baseline's, the graph's
and its FP32 emulation's. Experts are never widened as a whole: PyTorch's stack, and the graph's own bytes."""
LOGITS_BYTES = 4 * 4 + 3 * 8
"""Bytes for each logit that a validation holds: four runners' in FP32, and two of them and their difference in FP64."""
LOGITS_ROWS, PART_LOGITS_ROWS = 514 + 2 * COMPARED_ROWS, 162 + COMPARED_ROWS
"""Rows of logits that a validation, and the head alone, give, the envelope's included."""
POOL_COPIES, SCORE_COPIES = 5, 3
"""FP32 copies of the pools, and of the attention scores of a prompt, while steps run at the limits of the profile."""
CALIBRATION_TOKENS, STEP_TOKENS, ACTIVATIONS = 3000, 1024, 22
"""Tokens of the built-in text, tokens a step, and rows of the hidden size in FP32 that a layer needs for a token."""

# Files, in bytes
GRAPH_FILE, GRAPH_LAYER = 35_000, 8_000
"""The graph without weights: the ops' bodies, and the nodes of one layer."""
ENGINE_FILES = 15_000_000
"""The plugin library, and TensorRT's description of the engine."""

# Rates, in CPU seconds of the machine of docs/performance.md
ZEROS_A_SECOND = 4e9
"""Weights that are searched for zero rows."""
BYTES_A_SECOND = 1e9
"""Weights that are read, converted and written, or hashed."""
VALIDATED_A_SECOND = 5e6
"""Parameters that are validated, or that calibration runs all its tokens through."""
KERNELS_SECONDS, ENGINE_BYTES_A_SECOND = 15.0, 2e8
"""Compiling and linking the kernels of one GPU generation and dtype; weights that become an engine."""
START_SECONDS, VALIDATION_SECONDS = 2.0, 20.0
"""Imports and fixed work of each stage after the first; a validation's steps, whatever the model's size."""

LIMIT_FIELDS = ("max_context", "max_tokens", "max_sequences")
"""The limits of a profile that a user may lower."""

WITHOUT_WHOLE_STEPS = (
    "--no-validate skips it; then nemo-export validate --layers-alone takes one layer at a time"
)


@dataclass(frozen=True)
class StageEstimate:
    """What one stage needs: peak memory, bytes written to disk, and CPU seconds to one significant digit."""

    stage: str
    memory_bytes: int
    disk_bytes: int
    cpu_seconds: float
    runtime: str = ""
    """The only runtime whose builds have the stage; empty if all have it."""


def num_parameters(sources: Iterable[WeightSource]) -> int:
    """Elements of all stored tensors."""
    return sum(math.prod(tensor.shape) for source in sources for tensor in source.tensors)


def num_model_parameters(config: ModelConfig) -> int:
    """Parameters of the model that a configuration describes; the scales of FP8 are none."""
    sources = set(tensor_sources(config.unquantized()).values())  # tied embeddings are one
    return sum(len(source.names) * math.prod(source.shape) for source in sources)


def num_active_parameters(config: ModelConfig) -> int:
    """Parameters that one token passes: of the routed experts only those that it is routed to."""
    idle = config.n_routed_experts - config.num_experts_per_tok
    expert = 2 * config.moe_intermediate_size * config.expert_size
    return num_model_parameters(config) - config.layers.count("moe") * idle * expert


def graph_bytes(model: LoadedModel, precision: str) -> int:
    """Bytes of the graph's weights; the few that stay in FP32 are counted like the others."""
    return num_parameters(model.weights.values()) * WEIGHT_BYTES[precision]


def num_references(precision: str, layers: Sequence[str]) -> float:
    """FP32 copies of the weights that a validation holds at once.

    With experts, the rounding baseline (half the size) stays in memory next to a reference with forced routing.
    """
    return 1.5 if precision != "fp32" and "moe" in layers else 1.0


def check_memory(model: LoadedModel, *, hint: str, copies: float = 1.0) -> None:
    """Raise UsageError if `copies` FP32 copies of the model in PyTorch need more memory than the machine has."""
    parameters = copies * num_parameters(model.weights.values())
    memory = _validation_memory(parameters, model.config.vocab_size)
    _check_available(memory, "the comparison with PyTorch", UsageError, hint)


def check_part_memory(model: LoadedModel, precision: str) -> None:
    """Raise UsageError if comparing the largest part alone with PyTorch needs more memory than the machine has."""
    parts = Counter({HEAD: LOGITS_BYTES * PART_LOGITS_ROWS * model.config.vocab_size})
    for part, is_expert, source in _by_part(model.weights):
        per_parameter = 2 * WEIGHT_BYTES[precision] if is_expert else PART_BYTES[precision]
        parts[part] += per_parameter * num_parameters([source])
    ((largest, num_bytes),) = parts.most_common(1)
    what = f"comparing {largest} alone with PyTorch"
    _check_available(VALIDATION_MEMORY + num_bytes, what, UsageError, "use a machine with more")


def envelope_fits(model: LoadedModel, config: BuildConfig) -> bool:
    """Whether the whole model can run at the limits of the profile in this machine's memory."""
    copies = num_references(config.precision, model.config.layers)
    parameters = copies * num_parameters(model.weights.values())
    return _whole_memory(parameters, model.config, config) <= memory_bytes()


def _whole_memory(parameters: float, model: ModelConfig, config: BuildConfig) -> int:
    """Bytes for running the whole model at the limits of the profile."""
    limits = POOL_COPIES * sum(_pool_bytes(model, config)) + _step_bytes(model, config)
    return _validation_memory(parameters, model.vocab_size) + limits


def _part_memory(model: ModelConfig, config: BuildConfig) -> int:
    """Bytes for running the largest layer alone at the limits of the profile, without its weights."""
    pools = POOL_COPIES * max(_pool_bytes(model, config), default=0)
    return VALIDATION_MEMORY + pools + _step_bytes(model, config)


def _validated_memory(parameters: float, model: ModelConfig, config: BuildConfig) -> int:
    """Bytes for a validation, in which layers alone reach the limits if the whole model does not fit there."""
    if (whole := _whole_memory(parameters, model, config)) <= memory_bytes():
        return whole
    return max(_validation_memory(parameters, model.vocab_size), _part_memory(model, config))


def check_envelope(model: LoadedModel, config: BuildConfig) -> None:
    """Raise UsageError if no single layer can run at the limits of the profile, with limits at which one can."""
    available, needed = memory_bytes(), _part_memory(model.config, config)
    if needed <= available:
        return
    one_each = (_largest_fitting(model.config, config, field) for field in LIMIT_FIELDS)
    fitting = list(filter(None, one_each)) or list(filter(None, [_all_smaller(model.config, config)]))
    words = " or ".join(_changed_limits(config, smaller) for smaller in fitting)
    raise UsageError(
        f"validating {config.max_sequences} sequences of {config.max_context} tokens, in steps of"
        f" {config.max_tokens} tokens, needs about {needed / 1e9:.3g} GB of memory for one layer alone,"
        f" this machine has {available / 1e9:.3g} GB",
        hint=f"{words} can be validated here; --no-validate builds without validation"
        if words
        else "use a machine with more",
    )


def _largest_fitting(model: ModelConfig, config: BuildConfig, field: str) -> BuildConfig | None:
    """The configuration with one limit as large as fits this machine's memory; None if no value of it does."""
    unit = config.page_size if field == "max_context" else 1
    smallest = config.max_sequences if field == "max_tokens" else 1

    def smaller(units: int) -> BuildConfig:
        limit: dict[str, Any] = {field: max(smallest, units * unit)}
        return dataclasses.replace(config, **limit)

    low, high = 1, getattr(config, field) // unit
    if high < 1 or _part_memory(model, smaller(low)) > memory_bytes():
        return None
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (
            (middle, high) if _part_memory(model, smaller(middle)) <= memory_bytes() else (low, middle)
        )
    return smaller(low)


def _all_smaller(model: ModelConfig, config: BuildConfig) -> BuildConfig | None:
    """The configuration with all limits halved until it fits this machine's memory; None if none does."""
    while max(config.max_sequences, config.max_tokens, config.max_context // config.page_size) > 1:
        config = dataclasses.replace(
            config,
            max_sequences=max(1, config.max_sequences // 2),
            max_tokens=max(1, config.max_tokens // 2),
            max_context=max(config.page_size, config.max_context // 2 // config.page_size * config.page_size),
        )
        if _part_memory(model, config) <= memory_bytes():
            return config
    return None


def _changed_limits(config: BuildConfig, smaller: BuildConfig) -> str:
    """The options that give the limits of `smaller`, without those that `config` has."""
    return " ".join(
        f"--{field.replace('_', '-')} {getattr(smaller, field)}"
        for field in LIMIT_FIELDS
        if getattr(smaller, field) != getattr(config, field)
    )


def _pool_bytes(model: ModelConfig, config: BuildConfig) -> list[int]:
    """Bytes of each pool in FP32, with as many sequences of the maximum length as the profile allows."""
    pages = config.max_sequences * pages_of(config.max_context, config.page_size)
    pools = pool_specs(model, page_size=config.page_size, dtype=config.dtype)
    return [4 * math.prod(pool.shape(1 + config.max_sequences, 1 + pages)) for pool in pools]


def _step_bytes(model: ModelConfig, config: BuildConfig) -> int:
    """Bytes of a layer's activations, PyTorch's attention scores of the longest prompt, and logits beyond the usual."""
    prompt = min(config.max_tokens, config.max_context)
    heads = model.num_attention_heads if "attention" in model.layers else 0
    more_rows = max(0, config.max_sequences - COMPARED_ROWS)
    return (
        ACTIVATIONS * 4 * model.hidden_size * config.max_tokens
        + SCORE_COPIES * 4 * heads * prompt**2
        + LOGITS_BYTES * model.vocab_size * more_rows
    )


def check_engine_memory(weight_bytes: int) -> None:
    """Raise CompileError if building an engine of so many bytes needs more memory than the machine has."""
    hint = "--runtime onnx builds the bundle without engines"
    _check_available(ENGINE_MEMORY + weight_bytes, "building the engine", CompileError, hint)


def _check_available(num_bytes: int, what: str, error: type[ExportError], hint: str) -> None:
    available = memory_bytes()
    if num_bytes > available:
        raise error(
            f"{what} needs about {num_bytes / 1e9:.3g} GB of memory, this machine has {available / 1e9:.3g} GB",
            hint=hint,
        )


def _validation_memory(parameters: float, vocab_size: int) -> int:
    return int(VALIDATION_MEMORY + WEIGHTS_IN_FP32 * parameters + LOGITS_BYTES * LOGITS_ROWS * vocab_size)


def _by_part(sources: Mapping[str, WeightSource]) -> Iterator[tuple[str, bool, WeightSource]]:
    """For each parameter: its part of the model, whether it holds the weights of experts, and its source."""
    for name, source in sources.items():
        if parsed := LayerName.parse(name):
            yield parsed.part, name.endswith((f".{EXPERTS}.up", f".{EXPERTS}.down")), source


def stages(
    config: ModelConfig,
    sources: Mapping[str, WeightSource],
    num_tensors: int,
    build: BuildConfig,
    *,
    is_stored: bool,
    engines: Mapping[str, int],
) -> tuple[StageEstimate, ...]:
    """Each stage of a build, in order.

    `is_stored` says that the sources' files exist, so that holes of sparse files are not counted; `engines` maps a
    runtime whose engines can be built here to the number of GPU generations whose kernels must be compiled first.
    """
    parameters = stored_parameters(config, sources, build.dtype)
    layout = data_layout.lay_out(parameters, link=build.weights == "link")
    copied = [placed for placed in layout if placed.linked is None]
    quantized = [placed for placed in copied if _is_quantized_here(placed)]
    count = data_layout.allocated_bytes if is_stored else _length
    written = count(copied) + data_layout.data_bytes(copied) - _length(copied)
    weight_bytes = _length(layout)
    # Quantization adds two scales to each tensor.
    graph_tensors = num_tensors + 2 * sum(len(placed.source.tensors) for placed in quantized)
    program, bundle = (memory + TENSOR_MEMORY * graph_tensors for memory in (PROGRAM_MEMORY, BUNDLE_MEMORY))
    linked = {placed.linked for placed in layout if placed.linked is not None}
    hashed = data_layout.data_bytes(layout) + sum(path.stat().st_size for path in linked if is_stored)
    described, zeros = TENSOR_MEMORY * num_tensors, ZEROS_MEMORY * num_cores()
    estimates = [
        _estimate("load", LOAD_MEMORY + described, seconds=0.0),
        _estimate("zeros", TORCH_MEMORY + described + zeros, seconds=count(layout) / ZEROS_A_SECOND),
    ]
    if quantized:
        estimates.append(_quantize_stage(config, sources, quantized))
    estimates += [
        _estimate("trace", program),
        _estimate(
            "lower",
            program,
            written + GRAPH_FILE + GRAPH_LAYER * len(config.layers),
            seconds=START_SECONDS + (count(layout) + written) / BYTES_A_SECOND,
        ),
    ]
    num_dtypes = 2 if build.precision == "fp8" else 1
    for runtime, num_sms in engines.items():
        estimates += _engine_stages(program, weight_bytes, num_sms * num_dtypes, runtime)
    validated = num_references(build.precision, config.layers) * num_parameters(sources.values())
    estimates += [
        _estimate(
            "validate",
            _validated_memory(validated, config, build),
            seconds=VALIDATION_SECONDS + num_parameters(sources.values()) / VALIDATED_A_SECOND,
        ),
        _estimate("weights", bundle, seconds=weight_bytes / BYTES_A_SECOND),
        _estimate("bundle", bundle, seconds=START_SECONDS + hashed / BYTES_A_SECOND),
    ]
    for runtime in engines:
        seconds = START_SECONDS + (hashed + weight_bytes) / BYTES_A_SECOND
        estimates.append(_estimate("bundle", bundle, seconds=seconds, runtime=runtime))
    return tuple(estimates)


def _estimate(
    stage: str, memory: int, written: int = 0, *, seconds: float = START_SECONDS, runtime: str = ""
) -> StageEstimate:
    return StageEstimate(stage, memory, written, float(f"{seconds:.1g}"), runtime)


def _quantize_stage(
    config: ModelConfig, sources: Mapping[str, WeightSource], quantized: Sequence[Placed]
) -> StageEstimate:
    """Calibration holds one part in FP32 at a time; stacks of experts and embeddings stay in their stored dtype."""
    row_bytes = 4 * config.hidden_size
    layers: Counter[str] = Counter()
    embeddings = 0
    for part, is_expert, source in _by_part(sources):
        if part == EMBEDDINGS:
            embeddings += _stored(source)
        elif part != HEAD:
            layers[part] += _stored(source) if is_expert else 4 * num_parameters([source])
    largest = max(embeddings, *(ACTIVATIONS * STEP_TOKENS * row_bytes + layer for layer in layers.values()))
    saved = sum(_stored(placed.source) - placed.length for placed in quantized)
    return _estimate(
        "quantize",
        QUANTIZE_MEMORY + largest + CALIBRATION_TOKENS * row_bytes,
        sum(map(_stored, sources.values())) - saved,
        seconds=START_SECONDS + num_active_parameters(config) / VALIDATED_A_SECOND,
    )


def _engine_stages(memory: int, weight_bytes: int, num_kernel_sets: int, runtime: str) -> list[StageEstimate]:
    """`memory` is that of the process itself. Kernels without a linked library count as not yet compiled."""
    workers = KERNEL_WORKER_MEMORY * num_cores() if num_kernel_sets else 0
    return [
        _estimate("kernels", memory + workers, seconds=KERNELS_SECONDS * num_kernel_sets, runtime=runtime),
        _estimate(
            "compile",
            memory + ENGINE_MEMORY + weight_bytes,
            weight_bytes + ENGINE_FILES,
            seconds=START_SECONDS + weight_bytes / ENGINE_BYTES_A_SECOND,
            runtime=runtime,
        ),
    ]


def _is_quantized_here(placed: Placed) -> bool:
    fp8 = DType.FLOAT8_E4M3
    return placed.dtype == fp8 and any(tensor.dtype != fp8 for tensor in placed.source.tensors)


def _stored(source: WeightSource) -> int:
    return sum(tensor.length for tensor in source.tensors)


def _length(layout: Iterable[Placed]) -> int:
    return sum(placed.length for placed in layout)
