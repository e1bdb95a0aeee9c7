"""Load: a checkpoint folder, understood and found complete, with no tensor read."""

from __future__ import annotations

from pathlib import Path

from nemotrt.exporter.checkpoint.layer_selection import only_layers
from nemotrt.exporter.checkpoint.loaded_model import LoadedModel
from nemotrt.exporter.checkpoint.quant_config import with_recipe
from nemotrt.exporter.checkpoint.safetensors_reader import (
    open_checkpoint,
)
from nemotrt.exporter.checkpoint.side_files import check_side_files, read_config, side_files
from nemotrt.exporter.checkpoint.tensor_matching import match
from nemotrt.exporter.errors import CheckpointError


def load(checkpoint: Path, layers: str = "") -> LoadedModel:
    """The configuration and where each parameter's bytes lie; raises CheckpointError on what is wrong.

    With `layers`, of the layers alone that `layer_selection` takes it to mean; raises UsageError where it means none.
    """
    config, stored = read_config(checkpoint), open_checkpoint(checkpoint)
    config = with_recipe(config, stored, checkpoint)
    if layers:
        config, stored = only_layers(config, stored, layers)
    survey = match(config, stored)
    if survey.problems:
        first, others = survey.problems[0], len(survey.problems) - 1
        more = f" (nemo-export check lists {others} more problem{'s' * (others > 1)})" if others else ""
        raise CheckpointError(f"{first}{more}", hint=first.hint)
    check_side_files(checkpoint, config)
    return LoadedModel(
        folder=checkpoint,
        config=config,
        weights=survey.weights,
        not_exported=survey.not_exported,
        side_files=side_files(checkpoint),
    )
