"""Select some layers of a checkpoint, for a quick look at a large model.

Each layer keeps its index in the checkpoint, in the names of tensors, nodes and pools alike.
"""

import re
from collections.abc import Mapping, Sequence

from nemotrt.exporter.checkpoint.safetensors_reader import StoredTensor
from nemotrt.exporter.errors import UsageError
from nemotrt.model.config import ModelConfig
from nemotrt.plugins.contract import LayerName

FIRST_OF_EACH = "first-of-each"
"""Selects the first layer of each kind."""

ENTRY = re.compile(r"(?P<index>\d+)|(?P<first>\d*):(?P<end>\d*)")


def chosen_layers(layers: Sequence[str], choice: str) -> tuple[int, ...]:
    """The indices that `choice` selects: `0:4`, `0,3,7`, `0:2,7` or `first-of-each`.

    `layers` has each layer's kind. Raises UsageError when the choice is malformed, selects no layer, or lists layers
    twice or out of order.
    """
    if choice == FIRST_OF_EACH:
        return tuple(sorted(layers.index(kind) for kind in set(layers)))
    indices = [index for entry in choice.split(",") for index in _range(entry.strip(), choice, len(layers))]
    if indices != sorted(set(indices)):
        in_order = ",".join(map(str, sorted(set(indices))))
        raise UsageError(
            f"--layers {choice} must list each layer once, in the order in which they run",
            hint=f"use --layers {in_order}",
        )
    return tuple(indices)


def _range(entry: str, choice: str, num_layers: int) -> range:
    match = ENTRY.fullmatch(entry)
    if not match:
        raise UsageError(
            f"--layers {choice} does not select layers",
            hint=f"use a range (0:4), a list (0,3,7), or {FIRST_OF_EACH} for one layer of each kind",
        )
    if match["index"]:
        first, end = int(match["index"]), int(match["index"]) + 1
    else:
        first, end = int(match["first"] or 0), int(match["end"] or num_layers)
    if end > num_layers:
        raise UsageError(
            f"--layers {choice}: the model has {num_layers} layers", hint=f"use indices 0 to {num_layers - 1}"
        )
    if first >= end:
        raise UsageError(
            f"--layers {choice}: {entry} is an empty range", hint="write FIRST:END with FIRST below END"
        )
    return range(first, end)


def partial_model(indices: Sequence[int]) -> str:
    """Describe a partial model by its layers."""
    return f"a partial model: layer{'s' * (len(indices) > 1)} {', '.join(map(str, indices))}"


def only_layers(
    config: ModelConfig, stored: Mapping[str, StoredTensor], choice: str
) -> tuple[ModelConfig, Mapping[str, StoredTensor]]:
    """The configuration of the chosen layers (all if `choice` is empty), and the stored tensors without the others'.

    Tensors outside the layers stay, multi-token prediction included. Raises UsageError as `chosen_layers` does.
    """
    if not choice:
        return config, stored
    partial = config.only(chosen_layers(config.layers, choice))
    dropped = config.numbered_layers.keys() - partial.numbered_layers.keys()
    tensors = {
        name: tensor
        for name, tensor in stored.items()
        if (parsed := LayerName.parse(name)) is None or parsed.layer not in dropped
    }
    return partial, tensors
