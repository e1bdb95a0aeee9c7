"""What one stage hands to the next: frozen, and complete for the stage that reads it."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch.export import ExportedProgram

    from nemotrt.plugins.contract import PoolSpec


@dataclass(frozen=True)
class QuantizedCheckpoint:
    """A checkpoint in FP8, and what its scales were calibrated on."""

    folder: Path
    num_modules: int
    left_out: tuple[str, ...]
    """Modules that could be FP8, and were left as they are."""
    kv_cache: bool
    num_tokens: int
    starved_experts: tuple[str, ...]
    """Experts that saw too few tokens for a range of their own."""


@dataclass(frozen=True)
class TracedPart:
    """One traced module, to be written under `prefix`; parts of the same kind share a program.

    `parameters` maps the module's own parameter names to the model's.
    """

    program: ExportedProgram
    prefix: str
    parameters: dict[str, str]
    pools: tuple[PoolSpec, ...]


@dataclass(frozen=True)
class TracedModel:
    """The model's parts in the order in which tokens pass them, and the dtype and shape of each parameter."""

    parts: tuple[TracedPart, ...]
    pools: tuple[PoolSpec, ...]
    parameters: dict[str, Any]
    dtype: str


@dataclass(frozen=True)
class LoweredGraph:
    """An ONNX graph and its external data on disk."""

    path: Path
    nodes: int
    ops: dict[str, int]
    weight_bytes: int
    written_bytes: int = 0
    """Of them, those that were written to the data file: holes of a sparse checkpoint were not."""
    linked: tuple[str, ...] = ()
    """Files of the checkpoint that are in the bundle too, and hold some of its weights."""


@dataclass(frozen=True)
class CompiledEngine:
    """An engine, and what it needs: paths are below the bundle, empty where there is no such file."""

    runtime: str
    version: str
    """Of the TensorRT that built it, and that must run it."""
    path: str
    sms: tuple[int, ...]
    library: str
    library_build: str
    """The plugin library's own hash of what it was made from."""
    log: str
    timings: str
    max_rows: int
    """Rows of logits that a step may ask for."""
    num_plugins: int
    pools_seen: bool
    """Whether it could be checked that no pool is copied."""
    peak_bytes: int
    """Of the builder's memory."""
