"""A checkpoint that is understood: its configuration, and where each parameter's bytes lie."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from nemotrt.exporter.checkpoint.safetensors_reader import StoredTensor
from nemotrt.exporter.config import COMPUTE_DTYPES, BuildConfig
from nemotrt.model.checkpoint import Transform
from nemotrt.model.config import ModelConfig
from nemotrt.plugins.contract import PoolSpec


@dataclass(frozen=True)
class WeightSource:
    """Where a parameter's bytes lie: one stored tensor, or several that are stacked along a new first axis."""

    parameter: str
    tensors: tuple[StoredTensor, ...]
    transform: Transform


@dataclass(frozen=True)
class LoadedModel:
    """A checkpoint that is understood and complete; no tensor of it was read."""

    folder: Path
    config: ModelConfig
    weights: dict[str, WeightSource]
    not_exported: tuple[str, ...]
    side_files: tuple[str, ...]
    origin: LoadedModel | None = None
    """What these weights were quantized from by this tool, where they were."""

    def pools(self, config: BuildConfig) -> tuple[PoolSpec, ...]:
        """The pools of the graph that `config` asks for, in layer order."""
        from nemotrt.model.pools import pool_specs

        dtype = COMPUTE_DTYPES[config.precision]
        return pool_specs(
            self.config,
            page_size=config.page_size,
            dtype=dtype,
            state_dtype=COMPUTE_DTYPES[config.state_dtype],
            kv_dtype=dtype if config.kv_dtype == "bf16" else None,
        )
