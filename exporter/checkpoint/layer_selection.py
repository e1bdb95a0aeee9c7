"""A few layers of a checkpoint as a model: a quick look at one that is large.

Every layer keeps the index that it has in the checkpoint, in the names of tensors, nodes and pools alike.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence

from nemotrt.exporter.checkpoint.safetensors_reader import StoredTensor
from nemotrt.exporter.errors import UsageError
from nemotrt.model.checkpoint import is_mtp
from nemotrt.model.config import ModelConfig

FIRST_OF_EACH = "first-of-each"
"""The choice that means the first layer of each kind."""

ENTRY = re.compile(r"(?P<one>\d+)|(?P<first>\d*):(?P<end>\d*)")
LAYER = re.compile(r"\.layers\.(\d+)\.")


def chosen_layers(layers: Sequence[str], choice: str) -> tuple[int, ...]:
    """Indices of the layers that `choice` means: `0:4`, `0,3,7`, `0:2,7` or `first-of-each`.

    `layers` has each layer's kind. Raises UsageError on what means none, or a layer twice or out of its order.
    """
    if choice == FIRST_OF_EACH:
        return tuple(sorted(layers.index(kind) for kind in set(layers)))
    indices = [index for entry in choice.split(",") for index in _range(entry.strip(), choice, len(layers))]
    if indices != sorted(set(indices)):
        in_order = ",".join(map(str, sorted(set(indices))))
        raise UsageError(
            f"--layers {choice} is not in the order in which layers run, each once", hint=f"write {in_order}"
        )
    return tuple(indices)


def _range(entry: str, choice: str, num_layers: int) -> range:
    found = ENTRY.fullmatch(entry)
    if not found:
        raise UsageError(
            f"--layers {choice} is no choice of layers",
            hint=f"give a range as 0:4, a list as 0,3,7, or {FIRST_OF_EACH}: one of each kind",
        )
    if found["one"]:
        first, end = int(found["one"]), int(found["one"]) + 1
    else:
        first, end = int(found["first"] or 0), int(found["end"] or num_layers)
    if end > num_layers:
        raise UsageError(
            f"--layers {choice}: the model has {num_layers} layers",
            hint=f"they go from 0 to {num_layers - 1}",
        )
    if first >= end:
        raise UsageError(f"--layers {choice}: {entry} is an empty range", hint="give its first and its end")
    return range(first, end)


def partial_model(indices: Sequence[int]) -> str:
    """Which layers a partial model has, in words."""
    return f"layer{'s' * (len(indices) > 1)} {', '.join(map(str, indices))} of its checkpoint only"


def only_layers(
    config: ModelConfig, stored: Mapping[str, StoredTensor], choice: str
) -> tuple[ModelConfig, dict[str, StoredTensor]]:
    """The model of the chosen layers alone, and the stored tensors without those of its other layers.

    What is beside the layers stays, multi-token prediction included. Raises UsageError as `chosen_layers` does.
    """
    config = (whole := config).only(chosen_layers(whole.layers, choice))
    left_out = whole.numbered_layers.keys() - config.numbered_layers.keys()

    def is_left_out(name: str) -> bool:
        found = None if is_mtp(name) else LAYER.search(name)
        return found is not None and int(found[1]) in left_out

    return config, {name: tensor for name, tensor in stored.items() if not is_left_out(name)}
