"""The form of each layer: what decides its program, taken from the model's configuration and never from a graph."""

from collections.abc import Iterable
from typing import NamedTuple

from nemotrt.model.config import ModelConfig
from nemotrt.plugins.contract import LayerName


class LayerForm(NamedTuple):
    """What decides a layer's program; its sizes are those of every layer of its kind."""

    kind: str
    fp8: frozenset[str]
    """The layer's modules with FP8 weights: `mixer.in_proj`."""
    per_channel: frozenset[str]
    """Those of them that have one scale per output."""


def layer_forms(config: ModelConfig) -> dict[int, LayerForm]:
    """The form of each layer, by the layer's index in the checkpoint."""
    return {
        index: LayerForm(
            kind, _modules(config.recipe.modules, index), _modules(config.recipe.per_channel, index)
        )
        for index, kind in config.numbered_layers.items()
    }


def first_of_each_form(config: ModelConfig) -> dict[LayerForm, int]:
    """The first layer of each form; the others of the form are the same program with other weights."""
    first: dict[LayerForm, int] = {}
    for index, form in layer_forms(config).items():
        first.setdefault(form, index)
    return first


def _modules(names: Iterable[str], index: int) -> frozenset[str]:
    layers = (LayerName.parse(name) for name in names)
    return frozenset(layer.inner for layer in layers if layer and layer.layer == index)
