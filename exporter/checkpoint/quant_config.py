"""What a checkpoint says of its quantization, in the words of NVIDIA's ModelOpt: read strictly, and written.

It stands in config.json as `quantization_config`, in hf_quant_config.json, or in both:
https://github.com/NVIDIA/Model-Optimizer (modelopt/torch/export) writes both.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from fnmatch import translate
from importlib.metadata import version
from pathlib import Path
from typing import Any

from nemotrt.exporter.checkpoint.safetensors_reader import StoredTensor, file_inside, read_json
from nemotrt.exporter.errors import CheckpointError
from nemotrt.model.checkpoint import PREFIXES
from nemotrt.model.config import ModelConfig
from nemotrt.model.recipe import EXPERTS, Recipe, quantizable

HF_QUANT_CONFIG = "hf_quant_config.json"

FP8, MIXED = "FP8", "MIXED_PRECISION"
SUPPORTED = (
    "FP8 is supported as ModelOpt writes it: E4M3 weights with one scale each, or one an output,"
    " and static scales of inputs; or use the BF16 checkpoint"
)

KNOWN = frozenset(
    (
        *("quant_method", "quant_algo", "producer", "ignore", "exclude_modules", "quantized_layers"),
        *("kv_cache_scheme", "kv_cache_quant_algo", "config_groups"),
    )
)
"""Fields of a description that are understood."""

FLOAT8 = {"num_bits": 8, "type": "float", "dynamic": False}


@dataclass(frozen=True)
class Description:
    """Which modules are FP8: all but those that a pattern excludes, or those alone that are listed."""

    excluded: tuple[str, ...]
    listed: frozenset[str] | None
    kv_cache: bool
    where: str


def with_recipe(config: ModelConfig, stored: Mapping[str, StoredTensor], folder: Path) -> ModelConfig:
    """The configuration with the recipe that the checkpoint's own description gives; as it is if there is none.

    Raises CheckpointError, by name, on any quantization but FP8 and on a description that is not understood.
    """
    raws: dict[str, Any] = {}
    if config.quantization is not None:
        raws["quantization_config of config.json"] = config.quantization
    if (folder / HF_QUANT_CONFIG).exists():
        raws[HF_QUANT_CONFIG] = read_json(file_inside(folder, HF_QUANT_CONFIG)).get("quantization")
    recipes = {where: recipe(config, stored, describe(raw, where)) for where, raw in raws.items()}
    if len(set(recipes.values())) > 1:
        raise CheckpointError(
            " and ".join(recipes) + " say different things of what is quantized",
            hint="remove the one that is not the weights'",
        )
    return config.with_recipe(next(iter(recipes.values()), config.recipe))


def describe(raw: Any, where: str) -> Description:
    """A description as data; raises CheckpointError on what is not understood, or not FP8."""
    if not isinstance(raw, dict):
        raise CheckpointError(f"{where} has no object that describes the quantization")
    if (method := raw.get("quant_method", "modelopt")) != "modelopt":
        scheme = "block-scaled FP8" if raw.get("weight_block_size") else f"{method}"
        raise CheckpointError(f"{where}: the checkpoint is quantized as {scheme}", hint=SUPPORTED)
    algorithm = raw.get("quant_algo")
    if algorithm not in (FP8, MIXED):
        raise CheckpointError(
            f"{where}: the checkpoint is quantized as {algorithm or 'nothing that it names'}", hint=SUPPORTED
        )
    if unknown := sorted(raw.keys() - KNOWN):
        raise CheckpointError(f"{where}: {unknown[0]} is not understood", hint=SUPPORTED)
    for group in (raw.get("config_groups") or {}).values():
        for part in ("weights", "input_activations"):
            _check_float8(group.get(part), f"{where}: {part} of config_groups")
    return Description(
        excluded=tuple(raw.get("ignore") or raw.get("exclude_modules") or ()),
        listed=_listed(raw, where) if algorithm == MIXED else None,
        kv_cache=_kv_cache(raw, where),
        where=where,
    )


def _check_float8(scheme: Any, what: str) -> None:
    if not isinstance(scheme, dict) or any(scheme.get(name) != value for name, value in FLOAT8.items()):
        raise CheckpointError(f"{what} are not static 8-bit floats: {scheme}", hint=SUPPORTED)


def _kv_cache(raw: Mapping[str, Any], where: str) -> bool:
    if (algorithm := raw.get("kv_cache_quant_algo")) not in (None, FP8):
        raise CheckpointError(f"{where}: the KV cache is quantized as {algorithm}", hint=SUPPORTED)
    if (scheme := raw.get("kv_cache_scheme")) is not None:
        _check_float8(scheme, f"{where}: the KV cache's values")
    return algorithm is not None or scheme is not None


def _listed(raw: Mapping[str, Any], where: str) -> frozenset[str]:
    layers = raw.get("quantized_layers")
    if not isinstance(layers, dict):
        raise CheckpointError(f"{where}: {MIXED} without quantized_layers", hint=SUPPORTED)
    for module, entry in layers.items():
        algorithm = entry.get("quant_algo") if isinstance(entry, dict) else entry
        if algorithm != FP8:
            raise CheckpointError(f"{where}: {module} is quantized as {algorithm}", hint=SUPPORTED)
    return frozenset(_canonical(module) for module in layers)


def _canonical(name: str) -> str:
    """A module's name, or a pattern of names, as NemotronH has it.

    ModelOpt 0.47 leaves a NUL and a marker of its own behind each name where transformers 5 has renamed the modules:
    `lm_head.\\0backbone.pt_name_sentinel`.
    """
    name = name.partition(".\0")[0]
    prefix = next((prefix for prefix in PREFIXES if name.startswith(prefix)), "")
    return PREFIXES[0] + name.removeprefix(prefix) if prefix else name


def recipe(config: ModelConfig, stored: Mapping[str, StoredTensor], description: Description) -> Recipe:
    """The description applied to the model's modules; raises CheckpointError where experts of a layer differ."""
    is_excluded = pattern_matcher(description.excluded)
    if description.listed is not None:
        listed = description.listed

        def is_quantized(name: str) -> bool:
            return name in listed

    else:

        def is_quantized(name: str) -> bool:
            return not is_excluded(name)

    modules = set()
    for module in quantizable(config):
        names = list(_stored_modules(config, module))
        chosen = [name for name in names if is_quantized(name)]
        if chosen and len(chosen) < len(names):
            other = next(name for name in names if name not in chosen)
            raise CheckpointError(
                f"{description.where}: {chosen[0]} is quantized and {other} is not: a layer's experts must be alike"
            )
        modules.update([module] if chosen else [])
    return _with_shapes(config, Recipe(frozenset(modules), kv_cache=description.kv_cache), stored)


def pattern_matcher(patterns: Iterable[str]) -> Any:
    """Whether a module's name is one of the patterns, lies below one, or fits one that has wildcards."""
    each = [_canonical(pattern) for pattern in patterns]
    joined = "|".join(f"(?:{translate(part)})" for pattern in each for part in (pattern, f"{pattern}.*"))
    return re.compile(joined).match if each else lambda _: None


def _stored_modules(config: ModelConfig, module: str) -> Iterator[str]:
    """The modules that a checkpoint has for one of NemotronH's: its experts are one by one."""
    if not module.endswith(f".{EXPERTS}"):
        yield module
        return
    for expert in range(config.n_routed_experts):
        yield from (f"{module}.{expert}.{name}" for name in ("up_proj", "down_proj"))


def stored_recipe(config: ModelConfig, stored: Mapping[str, StoredTensor]) -> Recipe:
    """What is FP8 by the stored tensors alone, for a table of them that nothing describes."""
    modules = {
        module
        for module in quantizable(config)
        if any(
            tensor.dtype == "float8_e4m3fn"
            for name in _stored_modules(config, module)
            if (tensor := _find(stored, f"{name}.weight"))
        )
    }
    has_scales = any(name.endswith(".k_scale") for name in stored)
    return _with_shapes(config, Recipe(frozenset(modules), kv_cache=has_scales), stored)


def _with_shapes(config: ModelConfig, found: Recipe, stored: Mapping[str, StoredTensor]) -> Recipe:
    """The recipe with what the shapes and presence of stored scales add to it."""
    scales = {
        module: _find(stored, f"{next(_stored_modules(config, module))}.weight_scale")
        for module in found.modules
    }
    per_channel = {module for module, scale in scales.items() if scale and math.prod(scale.shape) > 1}
    has_scales = any(name.endswith((".k_scale", ".v_scale")) for name in stored)
    return Recipe(
        found.modules, frozenset(per_channel), found.kv_cache, kv_scales=found.kv_cache and has_scales
    )


def _find(stored: Mapping[str, StoredTensor], name: str) -> StoredTensor | None:
    own = name.removeprefix(PREFIXES[0])
    return next((stored[prefix + own] for prefix in PREFIXES if prefix + own in stored), None)


def cache_notes(config: ModelConfig, kv_dtype: str = "auto") -> tuple[str, ...]:
    """What a person should know of a cache like Nano's, if this model is built with one."""
    recipe = config.recipe
    is_fp8 = recipe.kv_cache and kv_dtype != "bf16" and "attention" in config.layers
    if not is_fp8 or recipe.kv_scales:
        return ()
    return (
        "the checkpoint wants an FP8 KV cache and stores no scales for it: 1 is taken, as vLLM does; keys and values"
        " beyond ±448 saturate, those below 0.016 lose precision (--kv-dtype bf16 builds a BF16 cache)",
    )


def described(recipe: Recipe, config: ModelConfig, *, has_mtp: bool) -> tuple[dict[str, Any], dict[str, Any]]:
    """A recipe as ModelOpt writes it: `quantization_config` of config.json, and hf_quant_config.json.

    What predicts further tokens (mtp.*) is not quantized, and a reader that takes it is told so.
    """
    excluded = [
        "lm_head",
        *(["mtp*"] if has_mtp else []),
        *(f"{name}.conv1d" for name in _mixers(config, "mamba")),
    ]
    excluded += [f"{name}.gate" for name in _mixers(config, "moe")]
    excluded += [module for module in quantizable(config) if module not in recipe.modules]
    producer = {"name": "nemo-export", "version": version("nemo-export")}
    quantization = {
        "quant_algo": FP8,
        "kv_cache_quant_algo": FP8 if recipe.kv_cache else None,
        "exclude_modules": excluded,
    }
    group = {"weights": FLOAT8, "input_activations": FLOAT8, "targets": ["Linear"]}
    config_json = {
        "quant_method": "modelopt",
        "quant_algo": FP8,
        "config_groups": {"group_0": group},
        "ignore": excluded,
        "producer": producer,
    } | ({"kv_cache_scheme": FLOAT8} if recipe.kv_cache else {})
    return config_json, {"producer": producer, "quantization": quantization}


def _mixers(config: ModelConfig, kind: str) -> Iterator[str]:
    return (f"backbone.layers.{i}.mixer" for i, own in config.numbered_layers.items() if own == kind)
