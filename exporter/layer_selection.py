"""A few layers of a checkpoint as a model of their own: a quick look at one that is large."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping, Sequence

from nemotrt.exporter.errors import UsageError
from nemotrt.exporter.tensor_files import StoredTensor
from nemotrt.model.config import ModelConfig

KINDS = "kinds"
"""The choice that means the first layer of each kind."""

RANGE = re.compile(r"(\d*):(\d*)")
LAYER = re.compile(r"(.*\blayers\.)(\d+)(\..*)")
"""A tensor's name up to its layer's index, the index, and the rest."""


def chosen_layers(layers: Sequence[str], choice: str) -> tuple[int, ...]:
    """Indices of the layers that `choice` means, `A:B` or `kinds`; raises UsageError where it means none.

    `layers` has each layer's kind.
    """
    if choice == KINDS:
        return tuple(sorted(layers.index(kind) for kind in set(layers)))
    found = RANGE.fullmatch(choice)
    if not found:
        raise UsageError(
            f"--layers {choice} is no choice of layers",
            hint=f"give a range, as 0:4, or {KINDS}: one of each kind",
        )
    first, end = int(found[1] or 0), int(found[2] or len(layers))
    if end > len(layers):
        raise UsageError(f"--layers {choice}: the model has {len(layers)} layers")
    if first >= end:
        raise UsageError(f"--layers {choice} is an empty range")
    return tuple(range(first, end))


def restrict(
    config: ModelConfig, stored: Mapping[str, StoredTensor], indices: Sequence[int]
) -> tuple[ModelConfig, dict[str, StoredTensor]]:
    """The configuration of these layers alone, and their tensors under the names that they have in it.

    What is beside the layers stays, multi-token prediction included.
    """
    new = {old: i for i, old in enumerate(indices)}
    kept = {}
    for name, tensor in stored.items():
        found = None if name.startswith("mtp.") else LAYER.fullmatch(name)
        if found is None:
            kept[name] = tensor
        elif (index := new.get(int(found[2]))) is not None:
            kept[f"{found[1]}{index}{found[3]}"] = tensor
    layers = tuple(config.layers[index] for index in indices)
    return dataclasses.replace(config, layers=layers), kept
