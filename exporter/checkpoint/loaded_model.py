"""A loaded checkpoint: its configuration, and where each parameter's bytes are stored."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from nemotrt.exporter.checkpoint.safetensors_reader import StoredTensor
from nemotrt.exporter.config import BuildConfig
from nemotrt.model.checkpoint import Transform
from nemotrt.model.config import ModelConfig
from nemotrt.model.step import pool_specs
from nemotrt.plugins.contract import PoolSpec


@dataclass(frozen=True)
class WeightSource:
    """The stored tensors of a parameter: one, or several that are stacked along a new first axis."""

    tensors: tuple[StoredTensor, ...]
    transform: Transform


@dataclass(frozen=True)
class LoadedModel:
    """A checkpoint whose files and headers have been checked; its tensors have not been read."""

    folder: Path
    config: ModelConfig
    weights: dict[str, WeightSource]
    not_exported: tuple[str, ...]
    side_files: tuple[str, ...]
    origin: LoadedModel | None = None
    """The checkpoint that the build quantized these weights from, if it did."""

    def pools(self, config: BuildConfig) -> tuple[PoolSpec, ...]:
        """The pools of the graph that `config` asks for, in layer order."""
        dtype = config.dtype
        return pool_specs(
            self.config,
            page_size=config.page_size,
            dtype=dtype,
            state_dtype=config.state,
            kv_dtype=dtype if config.kv_dtype == "bf16" else None,
        )
