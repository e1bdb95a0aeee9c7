"""Tiny random models of transformers' NemotronHForCausalLM, which the model is compared with.

Two defects of transformers 5.23 are corrected first; `test_transformers_model.py` shows that they are defects:
- Its prefill clamps dt to [time_step_min, ∞), ignoring the config's `time_step_limit`, so the attribute is set here.
- Its one-token step does not clamp dt at all, so that with a finite limit only its prefill is used.
It also builds attention without biases, ignoring `attention_bias`, so biased projections are inserted here.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from transformers import DynamicCache, NemotronHConfig, NemotronHForCausalLM

TransformersModel = Any
"""A NemotronHForCausalLM, whose modules have untyped attributes."""

CHUNK = 16
"""The chunk size of its scan; prompts of about this length use different code paths."""

BASE: dict[str, Any] = {
    "model_type": "nemotron_h",
    "vocab_size": 96,
    "hidden_size": 32,
    "chunk_size": CHUNK,
    "conv_kernel": 4,
    "mamba_num_heads": 8,
    "mamba_head_dim": 8,
    "ssm_state_size": 16,
    "n_groups": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "intermediate_size": 40,
    "n_routed_experts": 8,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 24,
    "moe_shared_expert_intermediate_size": 36,
    "routed_scaling_factor": 2.5,
    "time_step_limit": [0.0, math.inf],
    "layer_norm_epsilon": 1e-5,
    "max_position_embeddings": 4096,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
    "dtype": "float32",
}

FINITE = "finite time step limit"

CASES: dict[str, dict[str, Any]] = {
    "mlp, head dim 80, state 128, 1 group, 1 kv head": {
        "hybrid_override_pattern": "M-M*-",
        "mamba_num_heads": 2,
        "mamba_head_dim": 80,
        "ssm_state_size": 128,
        "n_groups": 1,
        "num_key_value_heads": 1,
    },
    "latent, top 6 of 8, 8 groups, layer list": {
        "layers_block_type": ["mamba", "moe", "attention", "moe", "mamba"],
        "moe_latent_size": 16,
        "num_experts_per_tok": 6,
        "n_groups": 8,
        "routed_scaling_factor": 5.0,
    },
    "no latent, top 1, state 256, 4 kv heads, no conv bias": {
        "hybrid_override_pattern": "ME*E",
        "num_experts_per_tok": 1,
        "ssm_state_size": 256,
        "num_key_value_heads": 4,
        "use_conv_bias": False,
    },
    "2 of 4 expert groups, top 3 unnormalized": {
        "hybrid_override_pattern": "ME*E",
        "num_experts_per_tok": 3,
        "n_routed_experts": 16,
        "n_group": 4,
        "topk_group": 2,
        "norm_topk_prob": False,
    },
    "biases everywhere, latent, 2 taps": {
        "hybrid_override_pattern": "M*E-",
        "use_bias": True,
        "mlp_bias": True,
        "attention_bias": True,
        "moe_latent_size": 8,
        "conv_kernel": 2,
    },
    "tied embeddings, eps 1e-3": {
        "hybrid_override_pattern": "*M-E",
        "tie_word_embeddings": True,
        "layer_norm_epsilon": 1e-3,
    },
    FINITE: {"hybrid_override_pattern": "ME*M", "time_step_limit": [0.05, 0.4]},
}


@dataclass
class Outputs:
    """The logits [tokens, V] from the last prompt token on, and the final states."""

    logits: Tensor
    pools: dict[str, Tensor] = field(default_factory=dict)
    """By the names of our pools: conv_state [C, taps−1], ssm_state [H, P, N], kv_cache [2, heads, tokens, dim]."""
    margin: float = math.inf
    """The smallest difference between the scores of a chosen expert and of the best other one."""


def raw_config(case: str) -> dict[str, Any]:
    """The contents of config.json for a case."""
    return BASE | CASES[case]


def build(case: str, *, seed: int = 0) -> TransformersModel:
    """The model of a case, with random parameters and buffers."""
    raw = raw_config(case)
    config = NemotronHConfig(**{name: value for name, value in raw.items() if name != "model_type"})
    config._attn_implementation = "eager"
    model: TransformersModel = NemotronHForCausalLM(config)
    model.eval().requires_grad_(False)
    generator = torch.Generator().manual_seed(seed)
    for mixer in _mixers(model, "full_attention"):
        if raw.get("attention_bias"):
            for name in ("q_proj", "k_proj", "v_proj", "o_proj"):
                old = getattr(mixer, name)
                setattr(mixer, name, nn.Linear(old.in_features, old.out_features).requires_grad_(False))
    for mixer in _mixers(model, "linear_attention"):
        mixer.time_step_limit = tuple(config.time_step_limit)
    for name, tensor in model.state_dict().items():
        tensor.copy_(_random(name, tensor, generator))
    if raw.get("tie_word_embeddings"):
        model.lm_head.weight.copy_(
            model.model.embeddings.weight
        )  # its parameters are not tied, so copy the values
    return model


def _mixers(model: TransformersModel, kind: str) -> Iterator[Any]:
    return (layer.mixer for layer in model.model.layers if layer.block_type == kind)


def _random(name: str, like: Tensor, generator: torch.Generator) -> Tensor:
    """Values in a realistic range for each parameter, none at its usual initial value."""
    values = torch.randn(like.shape, generator=generator)
    scales = {
        "norm.weight": (1.0, 0.3),
        "norm_f.weight": (1.0, 0.3),
        "A_log": (0.0, 0.7),
        "D": (0.0, 1.0),
        "dt_bias": (-1.5, 1.0),
        "conv1d.weight": (0.0, 0.5),
        "embeddings.weight": (0.0, 1.0),
        "e_score_correction_bias": (0.0, 0.1),
        "bias": (0.0, 0.3),
    }
    for suffix, (mean, deviation) in scales.items():
        if name.endswith(suffix):
            return mean + deviation * values
    return values / math.sqrt(like.shape[-1])


def stored(model: TransformersModel) -> dict[str, Tensor]:
    """The tensors of its state dict, without a tied head, as in a checkpoint."""
    tied = model.config.tie_word_embeddings
    return {
        name: tensor for name, tensor in model.state_dict().items() if not (tied and name == "lm_head.weight")
    }


def run(model: TransformersModel, tokens: Tensor, prompt: int, *, prefill_only: bool = False) -> Outputs:
    """Run `tokens` [n]: a prefill of `prompt` tokens and one step per further token, or everything in one prefill."""
    expected = Outputs(torch.empty(0))
    handles = [gate.register_forward_hook(_measure(expected)) for gate in _gates(model)]
    cache = DynamicCache(config=model.config)
    parts = [tokens] if prefill_only else [tokens[:prompt], *torch.split(tokens[prompt:], 1)]
    with torch.no_grad():
        rows = [
            model(input_ids=part[None], past_key_values=cache, use_cache=True).logits[0] for part in parts
        ]
    for handle in handles:
        handle.remove()
    expected.logits = torch.cat(rows)[prompt - 1 :]
    expected.pools = dict(_states(model, cache))
    return expected


def _gates(model: TransformersModel) -> list[Any]:
    return [mixer.gate for mixer in _mixers(model, "moe")]


def _measure(expected: Outputs) -> Any:
    def hook(gate: Any, _: object, output: tuple[Tensor, Tensor, Tensor]) -> None:
        logits_TE, _weights, chosen_TK = output
        scores_TE = logits_TE.sigmoid() + gate.e_score_correction_bias
        if gate.num_group > 1:
            grouped = scores_TE.unflatten(1, (gate.num_group, -1))
            ranked = grouped.topk(2, dim=2).values.sum(2).sort(dim=1, descending=True)
            gaps = ranked.values[:, gate.topk_group - 1] - ranked.values[:, gate.topk_group]
            expected.margin = min(expected.margin, gaps.min().item())
            dropped = ranked.indices[:, gate.topk_group :]
            scores_TE = grouped.scatter(1, dropped[..., None].expand(-1, -1, grouped.shape[2]), -9.0).flatten(
                1
            )
        chosen = scores_TE.gather(1, chosen_TK).min(dim=1).values
        best_other = scores_TE.scatter(1, chosen_TK, -9.0).max(dim=1).values
        expected.margin = min(expected.margin, (chosen - best_other).min().item())

    return hook


def _states(model: TransformersModel, cache: Any) -> Iterator[tuple[str, Tensor]]:
    for i, (layer, state) in enumerate(zip(model.model.layers, cache.layers, strict=True)):
        if layer.block_type == "linear_attention":
            # It stores as many columns as taps; the oldest is never read.
            yield f"conv_state.{i}", state.conv_states[0][0, :, 1:]
            yield f"ssm_state.{i}", state.recurrent_states[0][0]
        elif layer.block_type == "full_attention":
            yield f"kv_cache.{i}", torch.stack([state.keys[0], state.values[0]])
