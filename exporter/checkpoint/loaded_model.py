"""A loaded checkpoint: its configuration, and where each parameter's bytes are stored."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path

from nemotrt.exporter.checkpoint.safetensors_reader import StoredTensor
from nemotrt.exporter.config import BuildConfig
from nemotrt.model.checkpoint import Transform, parameters, tensor_sources
from nemotrt.model.config import ModelConfig
from nemotrt.model.step import pool_specs
from nemotrt.plugins.contract import DType, PoolSpec

IN_ORDER = (Transform.COPY, Transform.RESHAPE)
"""Transforms that change neither the values nor their order."""


@dataclass(frozen=True)
class WeightSource:
    """The stored tensors of a parameter: one, or several that are stacked along a new first axis."""

    tensors: tuple[StoredTensor, ...]
    transform: Transform

    def is_stored_as(self, dtype: DType) -> bool:
        """Whether a single stored tensor holds the parameter's values in `dtype`, in order."""
        return len(self.tensors) == 1 and self.transform in IN_ORDER and self.tensors[0].dtype == dtype


Parameter = tuple[WeightSource, tuple[int, ...], DType]
"""Where a parameter's values are stored, and its shape and dtype in the graph."""


def stored_parameters(
    config: ModelConfig, sources: Mapping[str, WeightSource], dtype: DType
) -> list[Parameter]:
    """The parameters that have a source, for a model that computes in `dtype`; tied parameters appear once."""
    found = parameters(config, dtype).items()
    return [(sources[name], shape, held) for name, (shape, held) in found if name in sources]


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
    end_tokens: Mapping[str, frozenset[int]] = field(default_factory=dict)
    """The end-of-text tokens by the file that names them."""
    zero_weights: str = ""
    """Weights that are zero and that the user accepts, in words."""

    def with_cache(self, kv_dtype: str) -> LoadedModel:
        """The model with the KV cache of `--kv-dtype`; a BF16 cache has no scales, even if the checkpoint stores some.

        Everything that reads a scale of the cache (graph, kernels, PyTorch) then reads 1.
        """
        if kv_dtype != "bf16" or not self.config.recipe.kv_cache:
            return self
        recipe = replace(self.config.recipe, kv_cache=False, kv_scales=False)
        config = self.config.with_recipe(recipe)
        constants = {
            name: WeightSource((), source.transform)
            for name, source in tensor_sources(config).items()
            if source.transform is Transform.ONES
        }
        return replace(self, config=config, weights=self.weights | constants)

    def pools(self, config: BuildConfig) -> tuple[PoolSpec, ...]:
        """The pools of the graph that `config` asks for, in layer order."""
        return pool_specs(
            self.config, page_size=config.page_size, dtype=config.dtype, state_dtype=config.state
        )
