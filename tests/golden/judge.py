"""transformers' own NemotronHForCausalLM as the judge: tiny models, every parameter random, its own cache.

Two faults of transformers 5.23 are set right before it judges; `test_judge.py` proves that they are faults:
- its prefill clamps dt to [time_step_min, ∞), whatever the config's `time_step_limit`: the attribute is set;
- its one-token step clamps dt to nothing at all: with a finite limit, only its prefill judges.
It builds attention without biases, whatever `attention_bias`: biased projections are put in their place.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from transformers import DynamicCache, NemotronHConfig, NemotronHForCausalLM

Judge = Any
"""A NemotronHForCausalLM; its modules' attributes are not typed."""

CHUNK = 16
"""The judge's chunk of the scan: prompts around it take its different paths."""

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
    "2 of 4 expert groups, top 3 unnormalised": {
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
class Verdict:
    """What the judge says: logits [tokens, V] from the last prompt token on, and its states at the end."""

    logits: Tensor
    pools: dict[str, Tensor] = field(default_factory=dict)
    """By our pools' names: conv_state [C, taps−1], ssm_state [H, P, N], kv_cache [2, heads, tokens, dim]."""
    margin: float = math.inf
    """The smallest gap between a chosen expert's score and the best one passed over."""


def raw_config(case: str) -> dict[str, Any]:
    """The case as a config.json."""
    return BASE | CASES[case]


def build(case: str, *, seed: int = 0) -> Judge:
    """The judge's model with every parameter and buffer random."""
    raw = raw_config(case)
    config = NemotronHConfig(**{name: value for name, value in raw.items() if name != "model_type"})
    config._attn_implementation = "eager"
    model: Judge = NemotronHForCausalLM(config)
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
        model.lm_head.weight.copy_(model.model.embeddings.weight)  # it has no tie: equal values stand in
    return model


def _mixers(model: Judge, kind: str) -> Iterator[Any]:
    return (layer.mixer for layer in model.model.layers if layer.block_type == kind)


def _random(name: str, like: Tensor, generator: torch.Generator) -> Tensor:
    """Values on the scale on which each parameter works, none where the usual initialisation leaves it."""
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


def stored(model: Judge) -> dict[str, Tensor]:
    """The judge's parameters by the names of its own state dict, a tied head left out as checkpoints do."""
    tied = model.config.tie_word_embeddings
    return {
        name: tensor for name, tensor in model.state_dict().items() if not (tied and name == "lm_head.weight")
    }


def run(model: Judge, tokens: Tensor, prompt: int, *, prefill_only: bool = False) -> Verdict:
    """The judge's word on `tokens` [n]: a prefill of `prompt`, then a step a token; or all in one prefill."""
    verdict = Verdict(torch.empty(0))
    handles = [gate.register_forward_hook(_measure(verdict)) for gate in _gates(model)]
    cache = DynamicCache(config=model.config)
    pieces = [tokens] if prefill_only else [tokens[:prompt], *torch.split(tokens[prompt:], 1)]
    with torch.no_grad():
        rows = [
            model(input_ids=piece[None], past_key_values=cache, use_cache=True).logits[0] for piece in pieces
        ]
    for handle in handles:
        handle.remove()
    verdict.logits = torch.cat(rows)[prompt - 1 :]
    verdict.pools = dict(_states(model, cache))
    return verdict


def _gates(model: Judge) -> list[Any]:
    return [mixer.gate for mixer in _mixers(model, "moe")]


def _measure(verdict: Verdict) -> Any:
    def hook(gate: Any, _: object, output: tuple[Tensor, Tensor, Tensor]) -> None:
        logits_TE, _weights, chosen_TK = output
        scores_TE = logits_TE.sigmoid() + gate.e_score_correction_bias
        if gate.num_group > 1:
            grouped = scores_TE.unflatten(1, (gate.num_group, -1))
            ranked = grouped.topk(2, dim=2).values.sum(2).sort(dim=1, descending=True)
            gaps = ranked.values[:, gate.topk_group - 1] - ranked.values[:, gate.topk_group]
            verdict.margin = min(verdict.margin, gaps.min().item())
            dropped = ranked.indices[:, gate.topk_group :]
            scores_TE = grouped.scatter(1, dropped[..., None].expand(-1, -1, grouped.shape[2]), -9.0).flatten(
                1
            )
        chosen = scores_TE.gather(1, chosen_TK).min(dim=1).values
        passed_over = scores_TE.scatter(1, chosen_TK, -9.0).max(dim=1).values
        verdict.margin = min(verdict.margin, (chosen - passed_over).min().item())

    return hook


def _states(model: Judge, cache: Any) -> Iterator[tuple[str, Tensor]]:
    for i, (layer, held) in enumerate(zip(model.model.layers, cache.layers, strict=True)):
        if layer.block_type == "linear_attention":
            # It keeps as many columns as taps; the oldest is never read.
            yield f"conv_state.{i}", held.conv_states[0][0, :, 1:]
            yield f"ssm_state.{i}", held.recurrent_states[0][0]
        elif layer.block_type == "full_attention":
            yield f"kv_cache.{i}", torch.stack([held.keys[0], held.values[0]])
