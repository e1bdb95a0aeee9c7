"""FP8 quantization gives the same weights and scales as NVIDIA's ModelOpt for the same checkpoint and text.

The results of ModelOpt were recorded by scripts/record_modelopt.py.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from nemotrt.exporter.config import PRESETS
from nemotrt.exporter.quantization.presets import recipe_of
from nemotrt.exporter.quantization.text import sequences
from nemotrt.exporter.stages.load import load
from nemotrt.exporter.stages.quantize import quantize
from nemotrt.model.recipe import EXPERTS

EXAMPLE = Path(__file__).resolve().parents[2] / "examples" / "tiny"
RECORD = json.loads((Path(__file__).parent / "modelopt_fp8.json").read_text(encoding="utf-8"))


def layer_of_experts(module: str) -> str:
    """`…mixer.experts.3.up_proj` → `…mixer.experts.up_proj`; other names are unchanged."""
    head, separator, tail = module.partition(f".{EXPERTS}.")
    return f"{head}{separator}{tail.partition('.')[2]}" if separator else module


@pytest.mark.parametrize("preset", PRESETS)
def test_a_preset_is_modelopt_s(preset: str) -> None:
    modules = recipe_of(load(EXAMPLE).config, preset, (), kv_cache=True).modules
    recorded = {layer_of_experts(module) for module in RECORD["presets"][preset]}
    assert {module.removesuffix(".up_proj").removesuffix(".down_proj") for module in recorded} == {
        module.removesuffix(".up_proj").removesuffix(".down_proj") for module in modules
    }


def test_every_fp8_byte_and_every_scale_is_modelopt_s(tmp_path: Path) -> None:
    model = load(EXAMPLE)
    recipe = recipe_of(model.config, "published", (), kv_cache=True)
    quantize(model, recipe, sequences(EXAMPLE, None, model.config.bos_token_id), tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    expected: dict[str, dict[str, Any]] = RECORD["presets"]["published"]
    assert {name for name, tensor in tensors.items() if tensor.dtype == torch.float8_e4m3fn} == {
        f"{module}.weight" for module in expected
    }
    # ModelOpt uses one input range for all experts of a layer; here each expert has its own, and the graph uses the
    # maximum.
    inputs: dict[str, float] = {}
    for module, facts in expected.items():
        weight = tensors[f"{module}.weight"].view(torch.uint8).numpy().tobytes()
        assert hashlib.sha256(weight).hexdigest() == facts["sha256"], module
        assert tensors[f"{module}.weight_scale"].item() == facts["weight_scale"], module
        name = layer_of_experts(module)
        inputs[name] = max(inputs.get(name, 0.0), tensors[f"{module}.input_scale"].item())
    for module, facts in expected.items():
        # Another FP32 implementation, which scans in chunks.
        assert inputs[layer_of_experts(module)] == pytest.approx(facts["input_scale"], rel=1e-5), module
