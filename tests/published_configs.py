"""Configurations that NVIDIA publishes, as data."""

from __future__ import annotations

import math
from typing import Any

AUTO_MAP = {
    "AutoConfig": "configuration_nemotron_h.NemotronHConfig",
    "AutoModelForCausalLM": "modeling_nemotron_h.NemotronHForCausalLM",
}

RECONSTRUCTED: dict[str, Any] = {
    "architectures": ["NemotronHForCausalLM"],
    "attention_bias": False,
    "chunk_size": 128,
    "conv_kernel": 4,
    "layer_norm_epsilon": 1e-05,
    "mamba_hidden_act": "silu",
    "mlp_bias": False,
    "mlp_hidden_act": "relu2",
    "model_type": "nemotron_h",
    "n_groups": 8,
    "residual_in_fp32": False,
    "tie_word_embeddings": False,
    "time_step_limit": [0.0, math.inf],
    "use_bias": False,
    "use_conv_bias": True,
    "vocab_size": 131072,
}

VERBATIM: dict[str, Any] = RECONSTRUCTED | {
    "attention_dropout": 0.0,
    "auto_map": AUTO_MAP,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "expand": 2,
    "hidden_dropout": 0.0,
    "initializer_range": 0.02,
    "mamba_head_dim": 64,
    "mamba_proj_bias": False,
    "num_logits_to_keep": 1,
    "pad_token_id": 0,
    "rescale_prenorm_residual": True,
    "sliding_window": None,
    "time_step_floor": 0.0001,
    "time_step_max": 0.1,
    "time_step_min": 0.001,
    "use_cache": True,
    "use_mamba_kernels": True,
}

MIXTURE: dict[str, Any] = VERBATIM | {
    "head_dim": 128,
    "mamba_ssm_cache_dtype": "float32",
    "max_position_embeddings": 262144,
    "n_group": 1,
    "n_shared_experts": 1,
    "norm_eps": 1e-05,
    "norm_topk_prob": True,
    "num_attention_heads": 32,
    "num_key_value_heads": 2,
    "partial_rotary_factor": 1.0,
    "rope_theta": 10000,
    "ssm_state_size": 128,
    "topk_group": 1,
}

NANO: dict[str, Any] = MIXTURE | {
    "auto_map": AUTO_MAP | {"AutoModel": "modeling_nemotron_h.NemotronHForCausalLM"},
    "hidden_size": 2688,
    "hybrid_override_pattern": "MEMEM*EMEMEM*EMEMEM*EMEMEM*EMEMEM*EMEMEMEM*EMEMEMEME",
    "intermediate_size": 1856,
    "mamba_num_heads": 64,
    "moe_intermediate_size": 1856,
    "moe_shared_expert_intermediate_size": 3712,
    "n_routed_experts": 128,
    "num_experts_per_tok": 6,
    "num_hidden_layers": 52,
    "routed_scaling_factor": 2.5,
    "torch_dtype": "bfloat16",
    "transformers_version": "4.53.2",
}
NANO.pop("time_step_limit")

SUPER: dict[str, Any] = MIXTURE | {
    "dtype": "bfloat16",
    "hidden_size": 4096,
    "hybrid_override_pattern": (
        "MEMEMEM*EMEMEMEM*EMEMEMEM*EMEMEMEMEM*EMEMEMEMEM*EMEMEMEMEM*EMEMEMEMEM*EMEMEMEM*EMEMEMEME"
    ),
    "intermediate_size": 2688,
    "mamba_num_heads": 128,
    "moe_intermediate_size": 2688,
    "moe_latent_size": 1024,
    "moe_shared_expert_intermediate_size": 5376,
    "moe_shared_expert_overlap": False,
    "mtp_hybrid_override_pattern": "*E",
    "n_routed_experts": 512,
    "num_experts_per_tok": 22,
    "num_hidden_layers": 88,
    "num_nextn_predict_layers": 1,
    "routed_scaling_factor": 5.0,
    "transformers_version": "4.57.1",
}

H_56B: dict[str, Any] = VERBATIM | {
    "attention_head_dim": 128,
    "hidden_size": 8192,
    "hybrid_override_pattern": "M-M-M-M*-" + "M-M-M-M-M*-" * 9 + "M-M-M-M-M-",
    "intermediate_size": 32768,
    "mamba_num_heads": 256,
    "max_position_embeddings": 8192,
    "num_attention_heads": 64,
    "num_hidden_layers": 118,
    "num_key_value_heads": 8,
    "rms_norm_eps": 1e-05,
    "ssm_state_size": 256,
    "time_step_rank": 512,
    "torch_dtype": "bfloat16",
    "transformers_version": "4.48.0.dev0",
}

H_8B: dict[str, Any] = RECONSTRUCTED | {
    "attention_head_dim": 128,
    "hidden_size": 4096,
    "hybrid_override_pattern": "M-M-M-M*-" + "M-M-M-M-M*-" * 3 + "M-M-M-M-M-",
    "intermediate_size": 21504,
    "mamba_head_dim": 64,
    "mamba_num_heads": 128,
    "max_position_embeddings": 8192,
    "num_attention_heads": 32,
    "num_hidden_layers": 52,
    "num_key_value_heads": 8,
    "ssm_state_size": 128,
}

NANO_9B: dict[str, Any] = RECONSTRUCTED | {
    "head_dim": 128,
    "hidden_size": 4480,
    "hybrid_override_pattern": "M-M-M-MM-M-M-M*-M-M-M*-M-M-M-M*-M-M-M-M*-M-MM-M-M-M-M-M-",
    "intermediate_size": 15680,
    "mamba_head_dim": 80,
    "mamba_num_heads": 128,
    "max_position_embeddings": 131072,
    "num_attention_heads": 40,
    "num_hidden_layers": 56,
    "num_key_value_heads": 8,
    "pad_token_id": 12,
    "ssm_state_size": 128,
}

PUBLISHED = {"nano": NANO, "super": SUPER, "h-56b": H_56B, "h-8b": H_8B, "nano-9b-v2": NANO_9B}
