"""Quantized checkpoints that are not taken, FP8 ones that are damaged, and texts that nothing can be calibrated on."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from bad_checkpoints import MLP_ONLY, SINGLE, Case, stored, tokenizer
from fp8_checkpoints import small
from safetensors.torch import save_file

IN_PROJ = "backbone.layers.0.mixer.in_proj"
EXPERT = "backbone.layers.1.mixer.experts.3.up_proj"


def described(**fields: Any) -> dict[str, Any]:
    """A config.json's description of a quantization."""
    return {"quantization_config": {"quant_method": "modelopt"} | fields}


def beside(ending: str, tensor: torch.Tensor) -> Callable[[Path], None]:
    """Add a tensor that only one quantization has, beside in_proj's weight."""

    def damage(folder: Path) -> None:
        save_file(stored(folder) | {IN_PROJ + ending: tensor}, folder / SINGLE)

    return damage


def fp8(**changes: torch.Tensor | None) -> Callable[[Path], None]:
    """An FP8 checkpoint with some tensors replaced, or left out, in the folder's place."""

    def damage(folder: Path) -> None:
        shutil.rmtree(folder)
        small(folder, **changes)

    return damage


def calibrated_on(name: str, content: str | bytes) -> Case:
    """The case of a good checkpoint and a text; what it must say is to be filled in."""

    def write(folder: Path) -> None:
        (folder / name).write_bytes(content if isinstance(content, bytes) else content.encode())

    return Case(
        "",
        tokenizer(write),
        model=MLP_ONLY | {"vocab_size": 1024, "bos_token_id": 1},
        options=("--precision", "fp8", "--calibration", f"checkpoint/{name}"),
        code=2,
    )


def saying(says: str, case: Case) -> Case:
    """The case with what it must say."""
    return Case(says, case.damage, case.config, case.model, case.options, case.code)


SCHEMES = {
    "nvfp4": Case("quantized as NVFP4", config=described(quant_algo="NVFP4")),
    "nvfp4-undescribed": Case(
        r"quantized as NVFP4 \(.*in_proj\.weight_scale_2\)", beside(".weight_scale_2", torch.ones(1))
    ),
    "nvfp4-in-one-layer": Case(
        r"backbone\.layers\.1\.mixer\.experts is quantized as NVFP4",
        config=described(
            quant_algo="MIXED_PRECISION",
            quantized_layers={
                IN_PROJ: {"quant_algo": "FP8"},
                "backbone.layers.1.mixer.experts": {"quant_algo": "NVFP4"},
            },
        ),
    ),
    "mxfp8": Case("quantized as MXFP8", config=described(quant_algo="MXFP8")),
    "mxfp8-undescribed": Case(
        r"quantized as MXFP8 \(.*in_proj\.weight_scale\)",
        beside(".weight_scale", torch.ones(4, dtype=torch.uint8)),
    ),
    "int4-awq": Case("quantized as W4A16_AWQ", config=described(quant_algo="W4A16_AWQ")),
    "int4-gptq": Case("quantized as gptq", config=described(quant_method="gptq", bits=4)),
    "int4-undescribed": Case(
        r"quantized as INT4 \(AWQ or GPTQ\) \(.*in_proj\.qweight\)",
        beside(".qweight", torch.ones(4, dtype=torch.int32)),
    ),
    "block-scaled": Case(
        "quantized as block-scaled FP8",
        config=described(quant_method="fp8", weight_block_size=[128, 128]),
    ),
    "block-scaled-by-modelopt": Case("quantized as FP8_PB_WO", config=described(quant_algo="FP8_PB_WO")),
    "block-scaled-undescribed": Case(
        r"quantized as block-scaled FP8 \(.*in_proj\.weight_scale_inv\)",
        beside(".weight_scale_inv", torch.ones(1, 1)),
    ),
    "nvfp4-cache": Case(
        "the KV cache is quantized as NVFP4",
        config=described(quant_algo="FP8", kv_cache_quant_algo="NVFP4"),
    ),
    "dynamic-scales": Case(
        "input_activations of config_groups must be static 8-bit floats",
        config=described(
            quant_algo="FP8",
            config_groups={
                "group_0": {
                    "weights": {"num_bits": 8, "type": "float", "dynamic": False},
                    "input_activations": {"num_bits": 8, "type": "float", "dynamic": True},
                }
            },
        ),
    ),
}

SCALES = {
    "scale-missing": Case(r"in_proj\.weight_scale is missing", fp8(**{f"{IN_PROJ}.weight_scale": None})),
    "expert-s-scale-missing": Case(
        r"experts\.3\.up_proj\.input_scale is missing", fp8(**{f"{EXPERT}.input_scale": None})
    ),
    "cache-scale-missing": Case(
        r"k_proj\.k_scale is missing", fp8(**{"backbone.layers.2.mixer.k_proj.k_scale": None})
    ),
    "scale-zero": Case(
        r"in_proj\.weight_scale is 0, but a scale must be above 0",
        fp8(**{f"{IN_PROJ}.weight_scale": torch.tensor(0.0)}),
    ),
    "scale-negative": Case(
        r"experts\.3\.up_proj\.weight_scale is -1, but a scale must be above 0",
        fp8(**{f"{EXPERT}.weight_scale": torch.tensor(-1.0)}),
    ),
    "scale-nan": Case(
        r"in_proj\.input_scale holds NaN", fp8(**{f"{IN_PROJ}.input_scale": torch.tensor(torch.nan)})
    ),
    "scale-infinite": Case(
        r"in_proj\.input_scale holds an infinity", fp8(**{f"{IN_PROJ}.input_scale": torch.tensor(torch.inf)})
    ),
    "fp8-weight-nan": Case(
        r"in_proj\.weight holds NaN",
        fp8(**{f"{IN_PROJ}.weight": torch.full((132, 32), torch.nan).to(torch.float8_e4m3fn)}),
    ),
    "weight-not-fp8": Case(
        r"in_proj\.weight is stored as bfloat16, but the checkpoint's description says it is FP8",
        fp8(**{f"{IN_PROJ}.weight": torch.ones(132, 32, dtype=torch.bfloat16)}),
    ),
    "weight-fp8-and-excluded": Case(
        r"q_proj\.weight is stored as float8_e4m3fn, but the checkpoint's description says it is not quantized",
        fp8(**{"backbone.layers.2.mixer.q_proj.weight": torch.ones(32, 32).to(torch.float8_e4m3fn)}),
    ),
    "precision-that-undoes-it": Case(
        "the checkpoint is FP8: --precision bf16 needs the weights from before quantization",
        fp8(),
        options=("--precision", "bf16"),
        code=2,
    ),
}

TEXTS = {
    "text-empty": saying(r"empty\.txt has 0 tokens; at least 256 are needed", calibrated_on("empty.txt", "")),
    "text-short": saying(
        r"short\.txt has \d+ tokens; at least 256 are needed", calibrated_on("short.txt", "few words")
    ),
    "text-not-text": saying("is not UTF-8 text", calibrated_on("noise.txt", bytes(range(256)) * 4)),
    "jsonl-not-json": saying(
        r"bad\.jsonl, line 2, is not valid JSON", calibrated_on("bad.jsonl", '{"text": "a"}\n{')
    ),
    "jsonl-without-text": saying(
        r"bare\.jsonl, line 1, has no text", calibrated_on("bare.jsonl", '{"prompt": "a"}')
    ),
    "nothing-left-to-quantize": Case(
        "all modules are excluded from quantization",
        tokenizer(lambda _: None),
        model={"hybrid_override_pattern": "M", "vocab_size": 1024},
        options=("--precision", "fp8"),
        code=2,
    ),
    "exclude-fits-nothing": Case(
        r"--exclude \*\.qproj matches no module that can be quantized",
        tokenizer(lambda _: None),
        model=MLP_ONLY | {"vocab_size": 1024},
        options=("--precision", "fp8", "--exclude", "*.qproj"),
        code=2,
    ),
    "exclude-without-fp8": Case(
        "--exclude has no effect: nothing is quantized", options=("--exclude", "*.up_proj"), code=2
    ),
    "no-tokenizer": Case(r"has no tokenizer\.json", options=("--precision", "fp8"), code=2),
    "gpu-without-fp8": Case(
        "SM 86 has no FP8 tensor cores",
        options=("--precision", "fp8", "--runtime", "tensorrt-rtx", "--sm", "86"),
        code=2,
    ),
}

ALL = SCHEMES | SCALES | TEXTS
