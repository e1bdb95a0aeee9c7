#!/usr/bin/env python3
"""What NVIDIA's ModelOpt makes of the example on the built-in text, which tests/golden compares with what is made here.

Needs nvidia-modelopt, requests, datasets and accelerate beside transformers. Recorded with ModelOpt 0.47.0,
transformers 5.23.0 and torch 2.13.0 on a CPU.
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
RECORD = ROOT / "tests" / "golden" / "modelopt_fp8.json"
PRESETS = {
    "conservative": mtq.MAMBA_MOE_FP8_CONSERVATIVE_CFG,
    "published": mtq.MAMBA_MOE_FP8_AGGRESSIVE_CFG,
}
"""Our name for a preset → ModelOpt's; of a model with latent experts, as the example, they are the same."""


def quantized(preset: dict[str, Any], folder: Path) -> dict[str, torch.Tensor]:
    """The tensors of the checkpoint that ModelOpt exports."""
    model = AutoModelForCausalLM.from_pretrained(EXAMPLE, dtype=torch.float32).eval()
    for module in model.modules():
        if hasattr(module, "time_step_limit"):  # its prefill clamps to 1e-3 whatever the configuration says
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
    """Each quantized module: its scales, and the hash of its weight's bytes."""
    found = {}
    for name, tensor in sorted(tensors.items()):
        module = name.removesuffix(".weight")
        if tensor.dtype == torch.float8_e4m3fn:
            found[module.replace("model.", "backbone.", 1)] = {
                "weight_scale": tensors[f"{module}.weight_scale"].item(),
                "input_scale": tensors[f"{module}.input_scale"].item(),
                "sha256": hashlib.sha256(tensor.view(torch.uint8).numpy().tobytes()).hexdigest(),
            }
    return found


def main() -> None:
    """Write the record."""
    environment.disable_amx()
    with tempfile.TemporaryDirectory() as folder:
        made = {name: record(quantized(preset, Path(folder) / name)) for name, preset in PRESETS.items()}
    RECORD.write_text(
        json.dumps({"modelopt": version("nvidia-modelopt"), "presets": made}, indent=1) + "\n",
        encoding="utf-8",
    )


if __name__ == "__main__":
    main()
