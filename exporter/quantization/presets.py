"""What is quantized where FP8 is made here: NVIDIA's own choices for the family, and what a user leaves out beside."""

from __future__ import annotations

from collections.abc import Sequence

from nemotrt.exporter.checkpoint.quant_config import pattern_matcher
from nemotrt.exporter.errors import UsageError
from nemotrt.model.config import ModelConfig
from nemotrt.model.recipe import EXPERTS, Recipe, quantizable

ATTENTION_AND_LATENT = ("*.q_proj", "*.k_proj", "*.v_proj", "*.o_proj", "*_latent_proj")
"""What NVIDIA leaves in BF16 in every FP8 checkpoint of the family, beside the head, routers and convolutions."""

MAMBA = ("*.mixer.in_proj", "*.mixer.out_proj")
"""What ModelOpt's MAMBA_MOE_FP8_CONSERVATIVE_CFG leaves out beside that."""


def exclusions(config: ModelConfig, preset: str) -> tuple[str, ...]:
    """Patterns of what a preset leaves out.

    `conservative`: ModelOpt's preset of that name, which NVIDIA's guides for the family take. `published`: as NVIDIA's
    FP8 checkpoints, Super's, and without a latent (Nano) the Mamba layers before attention too.
    """
    if preset == "conservative":
        return (*ATTENTION_AND_LATENT, *MAMBA)
    before = [
        f"backbone.layers.{i}.mixer"
        for i, kind in config.numbered_layers.items()
        if kind == "mamba" and config.numbered_layers.get(i + 1) == "attention"
    ]
    return (*ATTENTION_AND_LATENT, *([] if config.moe_latent_size else before))


def recipe_of(
    config: ModelConfig, preset: str, exclude: Sequence[str], *, kv_cache: bool, per_output: bool = False
) -> Recipe:
    """What is quantized: all that can be but for the preset's exclusions and `exclude`.

    With `per_output` experts have a scale for each output of a weight, which their op takes at no cost; a linear has
    one in all, which TensorRT scales by within its product. Raises UsageError on a dead pattern.
    """
    names = list(quantizable(config))
    for pattern in exclude:
        if not any(map(pattern_matcher([pattern]), names)):
            raise UsageError(
                f"--exclude {pattern} fits no module that can be quantized",
                hint=f"they are named like {names[0]}" if names else "the model has none",
            )
    is_excluded = pattern_matcher((*exclusions(config, preset), *exclude))
    kept = frozenset(name for name in names if not is_excluded(name))
    if not kept:
        raise UsageError(
            "everything is excluded from quantization",
            hint=(
                "use --preset published, which quantizes Mamba layers, or "
                if preset != "published"
                else "use "
            )
            + "--precision bf16",
        )
    experts = frozenset(name for name in kept if per_output and name.endswith(f".{EXPERTS}"))
    has_cache = kv_cache and "attention" in config.layers
    return Recipe(kept, experts, kv_cache=has_cache, kv_scales=has_cache)
