"""The data that one stage passes to the next: frozen dataclasses."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nemotrt.exporter.errors import CheckpointError

if TYPE_CHECKING:
    from torch.export import ExportedProgram

    from nemotrt.plugins.contract import PoolSpec


@dataclass(frozen=True)
class ZeroWeights:
    """Rows of a checkpoint's matrices that are zero, in words."""

    refused: str
    """Those that trained weights do not have; empty if there are none."""
    files: str
    """The files that hold them."""
    noted: str
    """Other zero rows."""

    @property
    def problem(self) -> CheckpointError | None:
        """The error for what is refused."""
        hint = f"download {self.files} again, or accept such weights with --allow-zero-weights"
        return CheckpointError(self.refused, hint=hint) if self.refused else None


@dataclass(frozen=True)
class QuantizedCheckpoint:
    """A checkpoint in FP8, and the facts of its calibration."""

    folder: Path
    num_modules: int
    left_out: tuple[str, ...]
    """Modules that could be FP8, but were excluded."""
    kv_cache: bool
    num_tokens: int
    starved_experts: tuple[str, ...]
    """Experts that saw too few tokens to have their own ranges."""


@dataclass(frozen=True)
class TracedPart:
    """A traced module whose node names start with `prefix`; parts of the same kind share a program.

    `parameters` maps the module's own parameter names to the model's.
    """

    program: ExportedProgram
    prefix: str
    parameters: dict[str, str]
    pools: tuple[PoolSpec, ...]


@dataclass(frozen=True)
class TracedModel:
    """The model's parts in execution order, and the dtype and shape of each parameter."""

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


@dataclass(frozen=True)
class CompiledEngine:
    """An engine and the files that it needs; paths are relative to the bundle, and empty if there is no such file."""

    runtime: str
    version: str
    """Version of TensorRT that built the engine and that must run it."""
    path: str
    sms: tuple[int, ...]
    library: str
    library_build: str
    """The hash of the sources of the plugin library."""
    log: str
    timings: str
    max_rows: int
    """Maximum number of logits rows in a step."""
    num_plugins: int
    pools_seen: bool
    """Whether TensorRT listed its layers, so that copies of pools could be ruled out."""
