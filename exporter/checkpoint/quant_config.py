"""Read and write the description of a checkpoint's quantization, in ModelOpt's format.

It is in config.json (`quantization_config`), in hf_quant_config.json, or in both, as NVIDIA ModelOpt writes it
(modelopt/torch/export in https://github.com/NVIDIA/Model-Optimizer).
"""

import math
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from fnmatch import translate
from importlib.metadata import version
from pathlib import Path
from typing import Any

from nemotrt.exporter.checkpoint.safetensors_reader import StoredTensor, file_inside, read_json
from nemotrt.exporter.errors import CheckpointError
from nemotrt.model.checkpoint import PREFIXES
from nemotrt.model.config import ModelConfig
from nemotrt.model.recipe import EXPERTS, Recipe
from nemotrt.plugins.contract import DType

HF_QUANT_CONFIG = "hf_quant_config.json"

FP8, MIXED = "FP8", "MIXED_PRECISION"
SUPPORTED = (
    "supported: FP8 as ModelOpt writes it, with E4M3 weights (one scale each, or one per output) and static input"
    " scales; or use the BF16 checkpoint"
)

FIELDS = {
    *("quant_method", "quant_algo", "producer", "ignore", "exclude_modules", "quantized_layers"),
    *("kv_cache_scheme", "kv_cache_quant_algo", "config_groups"),
}
"""The fields that a description may have."""

STATIC_FLOAT8 = {"num_bits": 8, "type": "float", "dynamic": False}

IsQuantized = Callable[[str], bool]
"""Whether a module of the checkpoint, given by its name, is quantized."""


def with_recipe(config: ModelConfig, stored: Mapping[str, StoredTensor], folder: Path | None) -> ModelConfig:
    """The configuration with the quantization that the checkpoint describes, or unchanged without a description.

    Without a folder, and without a description in config.json, the tensors' dtypes show the quantization.
    Raises CheckpointError on any scheme but FP8, and on a description that is malformed or contradicts another.
    """
    descriptions: dict[str, Any] = {}
    if config.quantization is not None:
        descriptions["quantization_config of config.json"] = config.quantization
    elif folder is None:
        return config.with_recipe(_stored_recipe(config, stored))
    if folder is not None and (folder / HF_QUANT_CONFIG).exists():
        descriptions[HF_QUANT_CONFIG] = read_json(file_inside(folder, HF_QUANT_CONFIG)).get("quantization")
    parsed = {where: parse_description(raw, where) for where, raw in descriptions.items()}
    # A description without a word about the KV cache does not contradict one that quantizes it.
    has_kv_cache = any(kv_cache for _, kv_cache in parsed.values())
    recipes = [
        _recipe(config, stored, is_quantized, has_kv_cache, where)
        for where, (is_quantized, _) in parsed.items()
    ]
    if len(recipes) == 2 and (different := recipes[0].modules ^ recipes[1].modules):
        raise CheckpointError(
            f"{' and '.join(descriptions)} disagree about {min(different)}",
            hint="remove the one that does not match the weights",
        )
    return config.with_recipe(recipes[0] if recipes else config.recipe)


def _stored_recipe(config: ModelConfig, stored: Mapping[str, StoredTensor]) -> Recipe:
    """The quantization that the tensors' dtypes and names show, for a table of tensors without a description."""

    def is_quantized(name: str) -> bool:
        tensor = _find(stored, f"{name}.weight")
        return tensor is not None and tensor.dtype == DType.FLOAT8_E4M3

    has_scales = any(name.endswith(".k_scale") for name in stored)
    return _recipe(config, stored, is_quantized, has_scales, "the table of tensors")


def _recipe(
    config: ModelConfig,
    stored: Mapping[str, StoredTensor],
    is_quantized: IsQuantized,
    has_kv_cache: bool,
    where: str,
) -> Recipe:
    """The quantized modules of the model and their scales; raises CheckpointError when experts of a layer differ."""
    modules = set()
    for module in config.quantizable_modules():
        names = list(_stored_modules(config, module))
        quantized = [name for name in names if is_quantized(name)]
        if quantized and len(quantized) < len(names):
            other = next(name for name in names if name not in quantized)
            raise CheckpointError(
                f"{where}: {quantized[0]} is quantized but {other} is not; all experts of a layer must be alike"
            )
        modules.update([module] if quantized else [])
    per_channel = {
        module
        for module in modules
        if (scale := _find(stored, f"{next(_stored_modules(config, module))}.weight_scale"))
        and math.prod(scale.shape) > 1
    }
    has_scales = any(name.endswith((".k_scale", ".v_scale")) for name in stored)
    return Recipe(
        frozenset(modules), frozenset(per_channel), has_kv_cache, kv_scales=has_kv_cache and has_scales
    )


def parse_description(raw: Any, where: str) -> tuple[IsQuantized, bool]:
    """Which modules a description quantizes, and whether it quantizes the KV cache.

    Raises CheckpointError on a malformed description, and on any scheme but FP8.
    """
    if not isinstance(raw, dict):
        raise CheckpointError(f"{where} has no object that describes the quantization")
    if (method := raw.get("quant_method", "modelopt")) != "modelopt":
        scheme = "block-scaled FP8" if raw.get("weight_block_size") else method
        raise CheckpointError(f"{where}: the checkpoint is quantized as {scheme}", hint=SUPPORTED)
    algorithm, has_kv_cache = raw.get("quant_algo"), _has_kv_cache(raw, where)
    if algorithm is None and has_kv_cache:
        return lambda name: False, True
    if algorithm not in (FP8, MIXED):
        scheme = algorithm or "a scheme without a name"
        raise CheckpointError(f"{where}: the checkpoint is quantized as {scheme}", hint=SUPPORTED)
    if unknown := sorted(raw.keys() - FIELDS):
        raise CheckpointError(f"{where}: {unknown[0]} is not a known field", hint=SUPPORTED)
    for group in (raw.get("config_groups") or {}).values():
        for part in ("weights", "input_activations"):
            _check_static_float8(group.get(part), f"{where}: {part} of config_groups")
    if algorithm == MIXED:
        return _listed(raw, where).__contains__, has_kv_cache
    is_excluded = pattern_matcher(raw.get("ignore") or raw.get("exclude_modules") or ())
    return lambda name: not is_excluded(name), has_kv_cache


def _check_static_float8(scheme: Any, what: str) -> None:
    if not isinstance(scheme, dict) or not STATIC_FLOAT8.items() <= scheme.items():
        raise CheckpointError(f"{what} must be static 8-bit floats, not {scheme}", hint=SUPPORTED)


def _has_kv_cache(raw: Mapping[str, Any], where: str) -> bool:
    """Whether one of the fields about the KV cache, as a word or an object, says FP8; null says nothing."""
    named = [
        value for name in ("kv_cache_quant_algo", "kv_cache_scheme") if (value := raw.get(name)) is not None
    ]
    for value in named:
        if isinstance(value, dict):
            _check_static_float8(value, f"{where}: the values of kv_cache_scheme")
        elif value != FP8:
            raise CheckpointError(f"{where}: the KV cache is quantized as {value}", hint=SUPPORTED)
    return bool(named)


def _listed(raw: Mapping[str, Any], where: str) -> frozenset[str]:
    layers = raw.get("quantized_layers")
    if not isinstance(layers, dict):
        raise CheckpointError(f"{where}: {MIXED} without quantized_layers", hint=SUPPORTED)
    for module, entry in layers.items():
        algorithm = entry.get("quant_algo") if isinstance(entry, dict) else entry
        if algorithm != FP8:
            raise CheckpointError(f"{where}: {module} is quantized as {algorithm}", hint=SUPPORTED)
    return frozenset(map(_canonical, layers))


def _canonical(name: str) -> str:
    """The name in NemotronH of a module, or of a pattern of modules.

    ModelOpt 0.47 leaves a NUL and a marker after each name where transformers 5 has renamed the modules:
    `lm_head.\\0backbone.pt_name_sentinel`.
    """
    name = name.partition(".\0")[0]
    prefix = next((prefix for prefix in PREFIXES if name.startswith(prefix)), "")
    return PREFIXES[0] + name.removeprefix(prefix) if prefix else name


def pattern_matcher(patterns: Iterable[str]) -> IsQuantized:
    """Whether a module matches one of the patterns (which may have wildcards), or is inside a module that does."""
    joined = "|".join(
        f"(?:{translate(part)})"
        for pattern in map(_canonical, patterns)
        for part in (pattern, f"{pattern}.*")
    )
    matches = re.compile(joined or r"(?!)").match
    return lambda name: matches(name) is not None


def _stored_modules(config: ModelConfig, module: str) -> Iterator[str]:
    """The checkpoint's modules for one of NemotronH's: checkpoints have a module for each expert's projection."""
    if not module.endswith(f".{EXPERTS}"):
        yield module
        return
    for expert in range(config.n_routed_experts):
        yield from (f"{module}.{expert}.{name}" for name in ("up_proj", "down_proj"))


def _find(stored: Mapping[str, StoredTensor], name: str) -> StoredTensor | None:
    inner = name.removeprefix(PREFIXES[0])
    return next((stored[prefix + inner] for prefix in PREFIXES if prefix + inner in stored), None)


def cache_notes(config: ModelConfig, kv_dtype: str = "auto") -> tuple[str, ...]:
    """A note for the user when the model is built with an FP8 KV cache for which the checkpoint has no scales."""
    recipe = config.recipe
    is_fp8 = recipe.kv_cache and kv_dtype != "bf16" and "attention" in config.layers
    if not is_fp8 or recipe.kv_scales:
        return ()
    return (
        "the checkpoint asks for an FP8 KV cache but stores no scales for it, so a scale of 1 is used, as in vLLM;"
        " keys and values beyond ±448 saturate, and those below 0.016 lose precision (--kv-dtype bf16 builds a BF16"
        " cache)",
    )


def describe(recipe: Recipe, config: ModelConfig, *, has_mtp: bool) -> tuple[dict[str, Any], dict[str, Any]]:
    """A recipe in ModelOpt's format: `quantization_config` of config.json, and the content of hf_quant_config.json.

    Multi-token prediction (mtp.*) is not quantized, which the description says if the checkpoint has it.
    """
    excluded = [
        "lm_head",
        *(["mtp*"] if has_mtp else []),
        *(f"{name}.conv1d" for name in _mixers(config, "mamba")),
        *(f"{name}.gate" for name in _mixers(config, "moe")),
        *(module for module in config.quantizable_modules() if module not in recipe.modules),
    ]
    producer = {"name": "nemo-export", "version": version("nemo-export")}
    quantization = {
        "quant_algo": FP8,
        "kv_cache_quant_algo": FP8 if recipe.kv_cache else None,
        "exclude_modules": excluded,
    }
    group = {"weights": STATIC_FLOAT8, "input_activations": STATIC_FLOAT8, "targets": ["Linear"]}
    config_json = {
        "quant_method": "modelopt",
        "quant_algo": FP8,
        "config_groups": {"group_0": group},
        "ignore": excluded,
        "producer": producer,
    } | ({"kv_cache_scheme": STATIC_FLOAT8} if recipe.kv_cache else {})
    return config_json, {"producer": producer, "quantization": quantization}


def _mixers(config: ModelConfig, kind: str) -> Iterator[str]:
    return (f"backbone.layers.{i}.mixer" for i, layer in config.numbered_layers.items() if layer == kind)
