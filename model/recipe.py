"""Which modules of a model hold FP8 weights: data that a checkpoint's tensors, the model and the graph follow."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from nemotrt.model.config import ModelConfig

EXPERTS = "experts"
"""The last part of the name of the module that holds a layer's routed experts."""

PROJECTIONS = {
    "mamba": ("in_proj", "out_proj"),
    "attention": ("q_proj", "k_proj", "v_proj", "o_proj"),
    "mlp": ("up_proj", "down_proj"),
    "moe": (EXPERTS, "shared_experts.up_proj", "shared_experts.down_proj"),
}
LATENT = ("fc1_latent_proj", "fc2_latent_proj")


@dataclass(frozen=True)
class Recipe:
    """FP8 (E4M3) weights with FP32 scales that multiply; the rest of the model keeps its dtype.

    Modules go by their names in NemotronH: `backbone.layers.4.mixer.in_proj`, `backbone.layers.1.mixer.experts`.
    """

    modules: frozenset[str] = frozenset()
    per_channel: frozenset[str] = frozenset()
    """Those of `modules` whose weights are stored with a scale for each output; the others, with one scale each."""
    kv_cache: bool = False
    """Whether every attention layer's cache is FP8."""
    kv_scales: bool = False
    """Whether the checkpoint stores a scale for keys and one for values of each layer; without, they are 1."""

    def only(self, layers: Collection[int]) -> Recipe:
        """The recipe of these layers alone, by their index."""
        own = frozenset(name for name in self.modules if int(name.split(".")[2]) in layers)
        return replace(self, modules=own, per_channel=self.per_channel & own)

    def __bool__(self) -> bool:
        return bool(self.modules) or self.kv_cache


def quantizable(config: ModelConfig) -> Iterator[str]:
    """Every module that can hold FP8 weights, in the model's order; the head, router and convolution cannot."""
    for i, kind in config.numbered_layers.items():
        latent = LATENT if kind == "moe" and config.moe_latent_size else ()
        for name in (*PROJECTIONS[kind], *latent):
            yield f"backbone.layers.{i}.mixer.{name}"
