"""Checkpoints whose tensors are damaged, missing or renamed."""

from __future__ import annotations

import torch

from bad_checkpoints.damage import MLP_ONLY, Case, added, one_value, renamed, replaced, without

TENSORS = {
    "missing-in-proj": Case(r"in_proj\.weight is missing", without("in_proj.weight")),
    "missing-a-log": Case(r"A_log is missing", without("A_log")),
    "missing-lm-head": Case(r"lm_head\.weight is missing", without("lm_head.weight")),
    "missing-conv-bias": Case(r"conv1d\.bias is missing", without("conv1d.bias")),
    "missing-expert": Case(r"experts\.2\.up_proj\.weight is missing", without("experts.2.up_proj.weight")),
    "extra-tensor": Case(
        "unknown.weight is in the checkpoint, but not in the model", added("unknown.weight")
    ),
    "wrong-shape": Case(
        r"out_proj\.weight has shape \[32, 31\], but the configuration requires \[32, 32\]",
        replaced("out_proj.weight", lambda tensor: tensor[:, :31]),
    ),
    "int8-weight": Case(
        r"up_proj\.weight is stored as int8", replaced("up_proj.weight", lambda tensor: tensor.to(torch.int8))
    ),
    "fp8-weights": Case(
        r"up_proj\.weight is FP8, but neither config\.json nor hf_quant_config\.json describes",
        replaced("up_proj.weight", lambda tensor: tensor.to(torch.float8_e4m3fn)),
    ),
    "fp8-only-said": Case(
        "the configuration describes a quantization, but no stored tensor is quantized",
        config={"quantization_config": {"quant_method": "modelopt", "quant_algo": "FP8"}},
    ),
    "nan": Case(
        r"up_proj\.weight holds NaN", replaced("up_proj.weight", one_value(torch.nan)), model=MLP_ONLY
    ),
    "infinity": Case(
        r"up_proj\.weight holds an infinity", replaced("up_proj.weight", one_value(torch.inf)), model=MLP_ONLY
    ),
    "nan-in-a-linked-weight": Case(
        r"up_proj\.weight holds NaN",
        replaced("up_proj.weight", one_value(torch.nan)),
        model=MLP_ONLY,
        options=("--weights", "link"),
    ),
    "fp16-overflow": Case(
        r"up_proj\.weight holds 100000, too large for FP16",
        replaced("up_proj.weight", one_value(1e5)),
        model=MLP_ONLY,
        options=("--precision", "fp16"),
    ),
    "a-log-overflow": Case(
        r"A_log holds 200, whose exponential is too large for FP32",
        replaced("A_log", one_value(200)),
        model={"hybrid_override_pattern": "M"},
    ),
}

WRAPPED = {
    "names-of-torch-compile": Case(
        r"\d+ of \d+ tensor names contain _orig_mod\., which torch\.compile adds",
        renamed(lambda name: f"_orig_mod.{name}"),
    ),
    "names-of-torch-compile-in-layers": Case(
        r"contain _orig_mod\., which torch\.compile adds \(backbone\.layers\.0\._orig_mod\.",
        renamed(lambda name: name.replace("layers.0.", "layers.0._orig_mod.")),
        options=("--layers", "0:1"),
    ),
    "names-of-fsdp": Case(
        r"_fsdp_wrapped_module\., which FSDP adds", renamed(lambda name: f"_fsdp_wrapped_module.{name}")
    ),
    "names-of-ddp": Case(
        r"module\., which DistributedDataParallel or DeepSpeed adds", renamed(lambda name: f"module.{name}")
    ),
    "names-of-peft": Case(
        r"base_model\.model\., which PEFT adds", renamed(lambda name: f"base_model.model.{name}")
    ),
    "names-of-lora": Case(
        r"lora_A\., which an unmerged LoRA adapter adds",
        lambda folder: added("base_model.model.backbone.layers.0.mixer.in_proj.lora_A.weight")(folder),
    ),
    "names-of-a-multimodal-model": Case(
        r"language_model\., which a multimodal model adds", renamed(lambda name: f"language_model.{name}")
    ),
}
