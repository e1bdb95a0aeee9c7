#!/usr/bin/env python3
"""Records how NVIDIA's ModelOpt quantizes the example with the built-in text, for the comparison in tests/parity.

Needs nvidia-modelopt, requests, datasets and accelerate in addition to transformers. The record was made with
ModelOpt 0.47.0, transformers 5.23.0 and torch 2.13.0 on a CPU.
"""

from __future__ import annotations

import copy
import hashlib
import json
import tempfile
from importlib.metadata import version
from pathlib import Path
from typing import Any

import modelopt.torch.quantization as mtq
import torch
from modelopt.torch.export import export_hf_checkpoint
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from nemotrt.exporter import environment
from nemotrt.exporter.quantization.text import sequences

ROOT = Path(__file__).resolve().parents[1]
EXAMPLE = ROOT / "examples" / "tiny"
RECORD = ROOT / "tests" / "parity" / "modelopt_fp8.json"
PRESETS = {
    "conservative": mtq.MAMBA_MOE_FP8_CONSERVATIVE_CFG,
    "published": mtq.MAMBA_MOE_FP8_AGGRESSIVE_CFG,
}
"""The ModelOpt preset for each of ours; for a model with latent experts, like the example, they are equal."""


def quantized(preset: dict[str, Any], folder: Path) -> dict[str, torch.Tensor]:
    """The tensors of the checkpoint that ModelOpt exports."""
    model = AutoModelForCausalLM.from_pretrained(EXAMPLE, dtype=torch.float32).eval()
    for module in model.modules():
        if hasattr(module, "time_step_limit"):  # its prefill ignores the config and clamps to 1e-3
            module.time_step_limit = (0.0, float("inf"))
    text = sequences(EXAMPLE, None, 1)

    def forward(model: Any) -> None:
        with torch.no_grad():
            for tokens in text:
                model(torch.from_numpy(tokens)[None], use_cache=False)

    mtq.quantize(model, copy.deepcopy(preset), forward)
    export_hf_checkpoint(model, export_dir=str(folder))
    return load_file(folder / "model.safetensors")


def record(tensors: dict[str, torch.Tensor]) -> dict[str, dict[str, Any]]:
    """The scales of each quantized module, and a hash of its weight's bytes."""
    modules = {}
    for name, tensor in sorted(tensors.items()):
        module = name.removesuffix(".weight")
        if tensor.dtype == torch.float8_e4m3fn:
            modules[module.replace("model.", "backbone.", 1)] = {
                "weight_scale": tensors[f"{module}.weight_scale"].item(),
                "input_scale": tensors[f"{module}.input_scale"].item(),
                "sha256": hashlib.sha256(tensor.view(torch.uint8).numpy().tobytes()).hexdigest(),
            }
    return modules


def main() -> None:
    """Write the record."""
    environment.disable_amx()
    with tempfile.TemporaryDirectory() as folder:
        presets = {name: record(quantized(preset, Path(folder) / name)) for name, preset in PRESETS.items()}
    RECORD.write_text(
        json.dumps({"modelopt": version("nvidia-modelopt"), "presets": presets}, indent=1) + "\n",
        encoding="utf-8",
    )


if __name__ == "__main__":
    main()
