"""Small random checkpoints for tests: every kind of layer, every parameter away from a value that would hide it."""

from __future__ import annotations

import json
import math
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from nemotrt.exporter.checkpoint import weights
from nemotrt.exporter.checkpoint.safetensors_reader import read_header
from nemotrt.exporter.checkpoint.tensor_matching import check_tied_head, match
from nemotrt.model.checkpoint import tensor_sources
from nemotrt.model.config import ModelConfig
from nemotrt.model.hybrid import NemotronH
from nemotrt.plugins.contract import DType

SMALL_LIMITS = {"max_tokens": 136, "max_sequences": 5, "max_context": 272}
"""A profile whose limits a validation reaches quickly."""

CONFIG: dict[str, Any] = {
    "architectures": ["NemotronHForCausalLM"],
    "model_type": "nemotron_h",
    "vocab_size": 96,
    "hidden_size": 32,
    "hybrid_override_pattern": "ME*-ME",
    "mamba_num_heads": 4,
    "mamba_head_dim": 8,
    "ssm_state_size": 16,
    "n_groups": 2,
    "conv_kernel": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "intermediate_size": 48,
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 24,
    "moe_latent_size": 16,
    "moe_shared_expert_intermediate_size": 24,
    "n_shared_experts": 1,
    "routed_scaling_factor": 2.5,
    "norm_eps": 1e-5,
    "eos_token_id": 2,
    "torch_dtype": "float32",
}


def random_tensors(config: dict[str, Any], *, seed: int = 0) -> dict[str, torch.Tensor]:
    """Every tensor of a checkpoint for the configuration, by its published name, in FP32."""
    generator = torch.Generator().manual_seed(seed)
    tensors = {}
    for source in tensor_sources(ModelConfig.from_dict(config)).values():
        for aliases in source.names:
            name, drawn = aliases[0], torch.randn(source.shape, generator=generator)
            if name.endswith(("norm.weight", "norm_f.weight", ".D")):
                drawn = 1 + 0.2 * drawn
            elif name.endswith(("A_log", "dt_bias")):
                drawn = 0.5 * drawn - 0.5
            elif drawn.ndim > 1:
                drawn /= math.sqrt(drawn.shape[-1])
            else:
                drawn *= 0.3
            tensors[name] = drawn
    return tensors


def load_into(model: NemotronH, tensors: Mapping[str, torch.Tensor]) -> None:
    """Fill the model from a checkpoint with these tensors; raises the first CheckpointError that an export reports."""
    with tempfile.TemporaryDirectory() as folder, torch.no_grad():
        path = Path(folder) / "model.safetensors"
        save_file({name: tensor.contiguous().clone() for name, tensor in tensors.items()}, path)
        check_tied_head(model.config, read_header(path))
        survey = match(model.config, read_header(path))
        for problem in survey.problems:
            raise problem
        for name, parameter in model.state_dict(keep_vars=True).items():
            dtype = DType.from_torch(parameter.dtype)
            parameter.copy_(weights.read(survey.weights[name], tuple(parameter.shape), dtype))


def write_checkpoint(folder: Path, **changes: Any) -> Path:
    """A checkpoint folder with one safetensors file; `changes` replace fields of CONFIG, None leaves one out."""
    config = {key: value for key, value in (CONFIG | changes).items() if value is not None}
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(config))
    dtype = getattr(torch, config.get("torch_dtype", "float32"))
    tensors = {name: tensor.to(dtype) for name, tensor in random_tensors(config).items()}
    save_file(tensors, folder / "model.safetensors")
    return folder
