"""Choose the modules to quantize: NVIDIA's choices for the model family, and the user's exclusions."""

from collections.abc import Sequence

from nemotrt.exporter.checkpoint.quant_config import pattern_matcher
from nemotrt.exporter.errors import UsageError
from nemotrt.model.config import ModelConfig
from nemotrt.model.recipe import EXPERTS, Recipe

ATTENTION_AND_LATENT = ("*.q_proj", "*.k_proj", "*.v_proj", "*.o_proj", "*_latent_proj")
"""Modules that stay in BF16 in all of NVIDIA's FP8 checkpoints of the family."""

MAMBA = ("*.mixer.in_proj", "*.mixer.out_proj")
"""Modules that ModelOpt's MAMBA_MOE_FP8_CONSERVATIVE_CFG excludes as well."""


def exclusions(config: ModelConfig, preset: str) -> tuple[str, ...]:
    """Patterns of the modules that a preset excludes.

    `conservative` is ModelOpt's preset of that name, which NVIDIA's guides for the family use. `published` matches
    NVIDIA's FP8 checkpoints of Super, and of Nano (without a latent), where it also excludes the Mamba layer before
    each attention layer.
    """
    if preset == "conservative":
        return (*ATTENTION_AND_LATENT, *MAMBA)
    if config.moe_latent_size:
        return ATTENTION_AND_LATENT
    before_attention = (
        f"backbone.layers.{i}.mixer"
        for i, kind in config.numbered_layers.items()
        if kind == "mamba" and config.numbered_layers.get(i + 1) == "attention"
    )
    return (*ATTENTION_AND_LATENT, *before_attention)


def recipe_of(
    config: ModelConfig, preset: str, exclude: Sequence[str], *, kv_cache: bool, per_output: bool = False
) -> Recipe:
    """The quantizable modules without those that the preset or `exclude` excludes.

    With `per_output`, the weights of experts get a scale for each output, which their op applies at no cost; a linear
    always gets one scale, as TensorRT's FP8 product needs. Raises UsageError on a pattern that matches no module.
    """
    names = list(config.quantizable_modules())
    for pattern in exclude:
        if not any(map(pattern_matcher([pattern]), names)):
            raise UsageError(
                f"--exclude {pattern} matches no module that can be quantized",
                hint=f"they have names like {names[0]}" if names else "the model has none",
            )
    is_excluded = pattern_matcher((*exclusions(config, preset), *exclude))
    modules = frozenset(name for name in names if not is_excluded(name))
    if not modules:
        published = "--preset published, which quantizes Mamba layers, or " if preset != "published" else ""
        raise UsageError(
            "all modules are excluded from quantization", hint=f"use {published}--precision bf16"
        )
    experts = frozenset(name for name in modules if per_output and name.endswith(f".{EXPERTS}"))
    has_cache = kv_cache and "attention" in config.layers
    return Recipe(modules, experts, kv_cache=has_cache, kv_scales=has_cache)
