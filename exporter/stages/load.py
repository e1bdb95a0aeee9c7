"""Load: read a checkpoint's configuration and headers, and check that it is complete."""

from collections.abc import Collection, Mapping
from pathlib import Path

from nemotrt.exporter.checkpoint.layer_selection import only_layers
from nemotrt.exporter.checkpoint.loaded_model import LoadedModel
from nemotrt.exporter.checkpoint.other_formats import check_names
from nemotrt.exporter.checkpoint.quant_config import with_recipe
from nemotrt.exporter.checkpoint.safetensors_reader import StoredTensor, open_checkpoint
from nemotrt.exporter.checkpoint.side_files import check_side_files, read_config, side_files
from nemotrt.exporter.checkpoint.tensor_matching import check_tied_head, match
from nemotrt.exporter.errors import CheckpointError
from nemotrt.model.config import ModelConfig


def read_headers(
    checkpoint: Path, layers: str = "", ignore_fields: Collection[str] = ()
) -> tuple[ModelConfig, Mapping[str, StoredTensor]]:
    """The configuration of a checkpoint folder and its stored tensors, or only those of `layers`."""
    config, stored = read_config(checkpoint, ignore_fields), open_checkpoint(checkpoint)
    check_names(stored)
    return only_layers(with_recipe(config, stored, checkpoint), stored, layers)


def load(checkpoint: Path, layers: str = "", ignore_fields: Collection[str] = ()) -> LoadedModel:
    """The model of a checkpoint folder, or of the layers that `layers` selects; no tensor is read but a second head.

    Unknown fields of config.json are an error unless they are in `ignore_fields`.
    Raises CheckpointError on the first problem of the checkpoint, UsageError as `chosen_layers` does.
    """
    config, stored = read_headers(checkpoint, layers, ignore_fields)
    matched = match(config, stored)
    if matched.problems:
        first, num_more = matched.problems[0], len(matched.problems) - 1
        more = f" (nemo-export check lists {num_more} more problem{'s' * (num_more > 1)})" if num_more else ""
        raise CheckpointError(f"{first}{more}", hint=first.hint)
    check_tied_head(config, stored)
    return LoadedModel(
        checkpoint,
        config,
        matched.weights,
        matched.not_exported,
        side_files(checkpoint),
        end_tokens=check_side_files(checkpoint, config),
    )
