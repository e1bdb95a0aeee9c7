"""The recipe that lists which modules of a model have FP8 weights, and whether the KV cache is FP8."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass, replace

EXPERTS = "experts"
"""The last part of the name of the module with a layer's routed experts."""

PROJECTIONS = {
    "mamba": ("in_proj", "out_proj"),
    "attention": ("q_proj", "k_proj", "v_proj", "o_proj"),
    "mlp": ("up_proj", "down_proj"),
    "moe": (EXPERTS, "shared_experts.up_proj", "shared_experts.down_proj"),
}
LATENT = ("fc1_latent_proj", "fc2_latent_proj")


@dataclass(frozen=True)
class Recipe:
    """The modules with FP8 (E4M3) weights and FP32 scales; the rest of the model keeps its dtype.

    Modules have their names in NemotronH: `backbone.layers.4.mixer.in_proj`, `backbone.layers.1.mixer.experts`.
    """

    modules: frozenset[str] = frozenset()
    per_channel: frozenset[str] = frozenset()
    """The modules whose weights have one scale per output; the others have one scale per weight."""
    kv_cache: bool = False
    """Whether every attention layer's cache is FP8."""
    kv_scales: bool = False
    """Whether the checkpoint stores scales for the keys and values of each layer; otherwise they are 1."""

    def only(self, layers: Collection[int]) -> Recipe:
        """The part of the recipe that concerns these layers."""
        modules = frozenset(name for name in self.modules if int(name.split(".")[2]) in layers)
        return replace(self, modules=modules, per_channel=self.per_channel & modules)

    def __bool__(self) -> bool:
        return bool(self.modules) or self.kv_cache
