"""Small FP8 checkpoints as ModelOpt publishes them, with random weights and scales."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from checkpoints import CONFIG, SMALL_LIMITS, random_tensors
from safetensors.torch import save_file

from nemotrt.exporter.config import BuildConfig
from nemotrt.exporter.stages.load import load
from nemotrt.exporter.stages.lower import lower
from nemotrt.exporter.stages.trace import trace
from nemotrt.model.config import ModelConfig
from nemotrt.model.recipe import EXPERTS

FLOAT8 = {"num_bits": 8, "type": "float", "dynamic": False}
EXCLUDED = ["lm_head", "backbone.layers.2.mixer*", "*.conv1d", "*.gate", "*_latent_proj"]
"""CONFIG's attention is layer 2."""

NANO = CONFIG | {
    "hybrid_override_pattern": "MEMEM*EMEMEM*EMEMEM*EMEMEM*EMEMEM*EMEMEMEM*EMEMEMEME",
    "moe_latent_size": None,
    "torch_dtype": "bfloat16",
}
"""Nano's layers, narrow."""
NANO_BF16 = (4, 11, 18, 25, 32, 41)
"""Mamba layers that NVIDIA leaves in BF16."""


def description(excluded: list[str], *, kv_cache: bool = True) -> dict[str, Any]:
    """What config.json says of the quantization."""
    group = {"weights": FLOAT8, "input_activations": FLOAT8, "targets": ["Linear"]}
    found = {
        "quant_method": "modelopt",
        "quant_algo": "FP8",
        "ignore": excluded,
        "config_groups": {"group_0": group},
        "producer": {"name": "modelopt", "version": "0.40.0"},
    }
    return found | ({"kv_cache_scheme": FLOAT8} if kv_cache else {})


def fp8_tensors(
    config: dict[str, Any], is_fp8: Callable[[str], bool], *, kv_scales: bool
) -> dict[str, torch.Tensor]:
    """Every tensor by its published name; weights of modules that `is_fp8` says hold any E4M3 but NaN."""
    tensors = {name: tensor.bfloat16() for name, tensor in random_tensors(config).items()}
    generator = torch.Generator().manual_seed(1)

    def scale() -> torch.Tensor:
        return torch.rand((), generator=generator) * 0.01 + 1e-4

    for name in list(tensors):
        module = name.removesuffix(".weight")
        if name.endswith("_proj.weight") and is_fp8(module):
            shape = tensors[name].shape
            bits = torch.randint(0, 127, shape, generator=generator, dtype=torch.uint8)
            sign = torch.randint(0, 2, shape, generator=generator, dtype=torch.uint8) * 128
            tensors[name] = (bits + sign).view(torch.float8_e4m3fn)
            tensors |= {f"{module}.weight_scale": scale(), f"{module}.input_scale": scale()}
        if kv_scales and module.endswith(("k_proj", "v_proj")):
            tensors[f"{module}.{module[-6]}_scale"] = scale()
    return tensors


def write(folder: Path, config: dict[str, Any], tensors: dict[str, torch.Tensor], said: Any) -> Path:
    """A checkpoint folder; what `said` says stands in config.json."""
    folder.mkdir(parents=True)
    raw = {key: value for key, value in config.items() if value is not None} | {"quantization_config": said}
    (folder / "config.json").write_text(json.dumps(raw))
    save_file(tensors, folder / "model.safetensors")
    return folder


def small(folder: Path, **changes: torch.Tensor | None) -> Path:
    """CONFIG with experts, shared experts, Mamba and MLP in FP8; `changes` replace tensors, None leaves one out."""
    config = CONFIG | {"torch_dtype": "bfloat16"}
    tensors = fp8_tensors(
        config, lambda name: ".2.mixer" not in name and "latent" not in name, kv_scales=True
    )
    for name, tensor in changes.items():
        del tensors[name]
        if tensor is not None:
            tensors[name] = tensor
    return write(folder, config, tensors, description(EXCLUDED))


def nano(folder: Path) -> Path:
    """Nano's layout: attention and six Mamba layers in BF16, an FP8 cache without scales."""
    layers = [f"backbone.layers.{i}.mixer" for i in NANO_BF16]
    layers += [
        f"backbone.layers.{i}.mixer" for i, kind in enumerate(NANO["hybrid_override_pattern"]) if kind == "*"
    ]
    tensors = fp8_tensors(
        NANO, lambda name: not any(name.startswith(f"{layer}.") for layer in layers), kv_scales=False
    )
    return write(folder, NANO, tensors, description(["lm_head", *(f"{layer}*" for layer in layers)]))


SUPER = CONFIG | {"hybrid_override_pattern": "MEMEM*EMEM*E", "torch_dtype": "bfloat16"}
"""Super's kinds of layers in the order in which it has them, few and narrow: latent experts, no MLP."""


def super_(folder: Path, **changes: Any) -> Path:
    """Super's layout: attention and latent projections in BF16, the rest FP8, and a cache with scales.

    `changes` replace fields of SUPER.
    """
    config = SUPER | changes
    left = ("q_proj", "k_proj", "v_proj", "o_proj", "latent_proj")
    tensors = fp8_tensors(config, lambda name: not name.endswith(left), kv_scales=True)
    excluded = ["lm_head", "mtp*", "*.conv1d", "*.gate", "*_latent_proj"]
    layers = [i for i, kind in enumerate(config["hybrid_override_pattern"]) if kind == "*"]
    excluded += [f"backbone.layers.{i}.mixer.{name}" for i in layers for name in left[:4]]
    tensors["mtp.layers.0.norm.weight"] = torch.ones(32, dtype=torch.bfloat16)
    return write(folder, config, tensors, description(excluded))


def lowered(checkpoint: Path, folder: Path) -> tuple[Path, BuildConfig]:
    """The graph of an FP8 checkpoint in a folder, and the configuration that it was lowered by."""
    config = BuildConfig(
        checkpoint=checkpoint, output=folder / "bundle", precision="fp8", runtime="onnx", **SMALL_LIMITS
    )
    model = load(checkpoint)
    lower(model, trace(model, config), folder / "model.onnx")
    return folder / "model.onnx", config


def stored_name(parameter: str) -> str:
    """The first stored tensor of a parameter, by its published name."""
    for own, stored in {
        f"{EXPERTS}.up_scale": f"{EXPERTS}.0.up_proj.weight_scale",
        f"{EXPERTS}.up": f"{EXPERTS}.0.up_proj.weight",
    }.items():
        if parameter.endswith(own):
            return parameter.removesuffix(own) + stored
    return parameter


def parsed(config: dict[str, Any]) -> ModelConfig:
    """The configuration without what is None."""
    return ModelConfig.from_dict({key: value for key, value in config.items() if value is not None})
