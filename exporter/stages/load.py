"""Load: a checkpoint folder, understood and found complete, with no tensor read."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from nemotrt.exporter.artifacts import LoadedModel, WeightSource
from nemotrt.exporter.errors import CheckpointError
from nemotrt.exporter.tensor_files import StoredTensor, open_checkpoint, read_json
from nemotrt.model.checkpoint import TensorError
from nemotrt.model.checkpoint import Source, find, is_mtp, tensor_sources
from nemotrt.model.config import ConfigError, ModelConfig

FLOATING = ("float64", "float32", "float16", "bfloat16")
"""Dtypes that a weight may be stored in; FP8 weights come with their scales."""

SIDE_FILES = (
    "config.json",
    "generation_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "chat_template.jinja",
    "LICENSE",
    "NOTICE",
)
"""Files of the checkpoint that go into the bundle as they are, where present."""


def load(checkpoint: Path) -> LoadedModel:
    """The configuration and where each parameter's bytes lie; raises CheckpointError that names what is wrong."""
    if not checkpoint.is_dir():
        raise CheckpointError(f"{checkpoint} is not a folder", hint="name the folder that holds config.json")
    if not (checkpoint / "config.json").is_file():
        raise CheckpointError(
            f"{checkpoint} has no config.json", hint="name a checkpoint folder in the Hugging Face layout"
        )
    try:
        config = ModelConfig.from_dict(read_json(checkpoint / "config.json"))
    except ConfigError as error:
        raise CheckpointError(f"{checkpoint / 'config.json'}: {error}") from error
    stored = open_checkpoint(checkpoint)
    shapes = {name: tensor.shape for name, tensor in stored.items()}
    weights = {name: _find(name, source, stored, shapes) for name, source in tensor_sources(config).items()}
    used = {tensor.name for weight in weights.values() for tensor in weight.tensors}
    unused = sorted(set(stored) - used)
    skipped = tuple(name for name in unused if is_mtp(name))
    extra = [name for name in unused if not is_mtp(name)]
    if extra:
        raise CheckpointError(
            f"{_listed(extra)} in the checkpoint, but not in the model that config.json describes",
            hint="the configuration and the weights are of different models",
        )
    return LoadedModel(
        folder=checkpoint,
        config=config,
        weights=weights,
        not_exported=skipped,
        side_files=tuple(name for name in SIDE_FILES if (checkpoint / name).is_file()),
    )


def _find(
    parameter: str, source: Source, stored: Mapping[str, StoredTensor], shapes: Mapping[str, tuple[int, ...]]
) -> WeightSource:
    """The stored tensors of one parameter, in the order in which they are stacked."""
    try:
        tensors = tuple(stored[name] for name in find(source, shapes))
    except TensorError as error:
        raise CheckpointError(
            str(error), hint="the configuration and the weights do not belong together"
        ) from error
    for tensor in tensors:
        if tensor.dtype not in FLOATING:
            raise CheckpointError(
                f"{tensor.name} is stored as {tensor.dtype}, which is not a weight format that this tool reads",
                hint="use the BF16, FP16 or FP32 checkpoint",
            )
    return WeightSource(parameter, tensors, source.transform)


def _listed(names: list[str]) -> str:
    more = f" and {len(names) - 1} more" if len(names) > 1 else ""
    return f"{names[0]}{more} {'are' if len(names) > 1 else 'is'}"
