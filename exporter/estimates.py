"""What a build will need, from shapes alone: no tensor is read.

Bytes written are exact to a page a tensor. Memory and time are rough: the rates were measured with a random model
of 167 M parameters; what other models need was not.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable
from dataclasses import dataclass

from nemotrt.exporter.artifacts import LoadedModel
from nemotrt.exporter.environment import memory_bytes
from nemotrt.exporter.errors import CompileError, UsageError
from nemotrt.exporter.tensor_files import StoredTensor

BYTES = {"fp32": 4, "fp16": 2, "bf16": 2, "fp8": 1}

BASE_MEMORY = 500_000_000
"""PyTorch and the traced graphs, without weights."""

RUNNER_MEMORY = 1.3
"""Of a copy of the weights in FP32, for a runner and what its steps need."""

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

ENGINE_BASE = 300_000_000
ENGINE_COPIES = 2.2
"""Of the weights, for TensorRT-RTX 1.7: 2.09 measured at 4.2 GB, 2.04 at 8.4 GB; one of them is the mapped graph."""

TRACE_SECONDS = 1.0
"""CPU seconds a kind of layer."""
LOWER_RATE = 300e6
"""Bytes written a CPU second."""
HASH_RATE = 1.5e9
"""Bytes a CPU second."""
VALIDATE_SECONDS = {"fp32": 0.32e-6, "fp16": 0.55e-6, "bf16": 0.55e-6, "fp8": 0.6e-6}
"""CPU seconds a parameter, and VALIDATE_BASE for the steps themselves."""
VALIDATE_BASE = 8.0


@dataclass(frozen=True)
class StageEstimate:
    """What one stage needs: bytes of memory at its peak, bytes written to disk, and CPU seconds."""

    stage: str
    memory_bytes: int
    disk_bytes: int
    cpu_seconds: float


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
        place = re.sub(r"^backbone\.(layers\.\d+|embeddings).*", r"\1", name)
        place = place if place != name else "head"
        is_expert = name.endswith((".experts.up", ".experts.down"))
        per_parameter = EXPERT_COPIES * BYTES[precision] if is_expert else PART_BYTES[precision]
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


def _validate_memory(parameters: int, vocab_size: int) -> int:
    logits = LOGITS_COPIES * LOGITS_ROWS * vocab_size * 8
    return int(BASE_MEMORY + RUNNER_MEMORY * 4 * parameters + logits)


def engine_memory(weight_bytes: int) -> int:
    """Bytes that the builder of an engine with so many bytes of weights has at its peak."""
    return int(ENGINE_BASE + ENGINE_COPIES * weight_bytes)


def check_engine_memory(weight_bytes: int) -> None:
    """Raise CompileError when building the engine needs more memory than there is."""
    wanted, there = engine_memory(weight_bytes), memory_bytes()
    if wanted > there:
        raise CompileError(
            f"building the engine needs about {wanted / 1e9:.3g} GB of memory, this machine has {there / 1e9:.3g} GB",
            hint="--runtime onnx builds the bundle without engines",
        )


def stages(parameters: int, vocab_size: int, kinds: int, precision: str) -> tuple[StageEstimate, ...]:
    """Each stage of a build of so many parameters; `kinds` is how many kinds of layer there are."""
    written = parameters * BYTES[precision]
    return (
        StageEstimate("load", 50_000_000, 0, 1.0),
        StageEstimate("trace", BASE_MEMORY, 0, TRACE_SECONDS * kinds),
        StageEstimate("lower", BASE_MEMORY, written, written / LOWER_RATE),
        StageEstimate(
            "validate",
            _validate_memory(parameters, vocab_size),
            0,
            VALIDATE_BASE + VALIDATE_SECONDS[precision] * parameters,
        ),
        StageEstimate("bundle", BASE_MEMORY, 0, written / HASH_RATE),
    )
