"""Name what a folder, a file or a set of tensors is, if it is not a checkpoint in the Hugging Face layout."""

import fnmatch
from collections.abc import Iterable
from pathlib import Path

from nemotrt.exporter.errors import CheckpointError

_MEGATRON_HINT = "convert it with Megatron Bridge: AutoBridge.export_ckpt writes the Hugging Face layout"

_FORMATS: dict[tuple[str, ...], tuple[str, str]] = {
    ("adapter_config.json", "adapter_model.*"): (
        "is a LoRA adapter, not a whole model",
        "merge it into its base model with PEFT: model.merge_and_unload().save_pretrained(folder)",
    ),
    ("*.gguf",): (
        "is a model in GGUF, the format of llama.cpp",
        "use the checkpoint that it was converted from",
    ),
    ("*.nemo", "model_config.yaml", "context/model.yaml"): ("is a checkpoint of NeMo", _MEGATRON_HINT),
    ("latest_checkpointed_iteration.txt", "mp_rank_*", "common.pt"): (
        "is a checkpoint of Megatron",
        _MEGATRON_HINT,
    ),
    ("zero_to_fp32.py", "*zero_pp_rank_*", "global_step*"): (
        "is a checkpoint of DeepSpeed",
        "run its zero_to_fp32.py with --safe_serialization",
    ),
    ("*.distcp", "pytorch_model_fsdp_*"): (
        "is a distributed checkpoint of PyTorch (DCP)",
        "load it into the model that was trained, then model.save_pretrained(folder)",
    ),
    ("*.bin", "*.pt", "*.pth", "*.ckpt"): (
        "has only pickled weights, which can run code when loaded",
        "convert them with transformers: model.save_pretrained(folder) writes safetensors",
    ),
}
"""Patterns of files that only one format has → what the format is, and what to do. The first match decides."""

_WRAPPERS = {
    "_orig_mod.": ("torch.compile", "save the state dict of the model from before torch.compile"),
    "_fsdp_wrapped_module.": ("FSDP", "gather the full state dict with FSDP's own functions, and save that"),
    "_checkpoint_wrapped_module.": (
        "activation checkpointing",
        "save the state dict of the model from before it was wrapped",
    ),
    "lora_A.": (
        "an unmerged LoRA adapter",
        "merge it with PEFT: model.merge_and_unload().save_pretrained(folder)",
    ),
    "base_model.model.": ("PEFT", "merge the adapter: model.merge_and_unload().save_pretrained(folder)"),
    "_forward_module.": ("Lightning Fabric", "save the state dict of the module inside"),
    "language_model.": ("a multimodal model", "save the state dict of its language model"),
    "module.": ("DistributedDataParallel or DeepSpeed", "save the state dict of model.module"),
}
"""A part of tensor names that a training tool adds → the tool, and what to do."""


def other_format(path: Path) -> CheckpointError | None:
    """The error that names the format of a folder or file, and what to do; None for a format that is not known."""
    for patterns, (is_what, hint) in _FORMATS.items():
        for pattern in patterns:
            if path.is_dir() and (files := sorted(path.glob(pattern))):
                return CheckpointError(f"{path} {is_what} ({files[0].relative_to(path)})", hint=hint)
            if path.is_file() and fnmatch.fnmatch(path.name, pattern):
                return CheckpointError(f"{path} {is_what}", hint=hint)
    return None


def check_names(names: Iterable[str]) -> None:
    """Raise CheckpointError if a training tool has wrapped the model, so that all its tensors have other names."""
    names = sorted(names)
    for part, (tool, hint) in _WRAPPERS.items():
        if wrapped := [name for name in names if name.startswith(part) or f".{part}" in name]:
            raise CheckpointError(
                f"{len(wrapped)} of {len(names)} tensor names contain {part}, which {tool} adds ({wrapped[0]})",
                hint=f"{hint}, or rename the tensors",
            )
