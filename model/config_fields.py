"""The names that config.json files of the family use: what each means, or why it means nothing here."""

from __future__ import annotations

from typing import Any

PATTERN = {"M": "mamba", "*": "attention", "-": "mlp", "E": "moe"}
"""Characters of `hybrid_override_pattern`."""

LAYER_NAMES = {
    "mamba": "mamba",
    "attention": "attention",
    "mlp": "mlp",
    "moe": "moe",
    "linear_attention": "mamba",
    "full_attention": "attention",
}
"""Names in `layers_block_type`: the published ones, and those that transformers 5 writes."""

ALIASES = {
    "norm_eps": ("layer_norm_epsilon", "norm_eps", "rms_norm_eps"),
    "head_dim": ("head_dim", "attention_head_dim"),
    "dtype": ("dtype", "torch_dtype"),
    "num_key_value_heads": ("num_key_value_heads", "num_query_groups"),
    "n_groups": ("n_groups", "mamba_n_groups"),
    "conv_kernel": ("conv_kernel", "mamba_d_conv"),
    "use_conv_bias": ("use_conv_bias", "mamba_conv_bias"),
    "time_step_limit": ("time_step_limit", "mamba_dt_limit"),
    "n_routed_experts": ("n_routed_experts", "num_local_experts"),
    "ssm_state_dtype": ("mamba_ssm_cache_dtype",),
    "num_mtp_layers": ("num_nextn_predict_layers",),
    "quantization": ("quantization_config",),
}
"""A normalised field → every name that a config.json may give it; given twice, they must agree."""

USED_BY: dict[str, tuple[str, ...]] = {
    **dict.fromkeys(
        (
            *("mamba_num_heads", "mamba_head_dim", "ssm_state_size", "n_groups", "conv_kernel"),
            *("use_conv_bias", "use_bias", "time_step_limit", "ssm_state_dtype"),
        ),
        ("mamba",),
    ),
    **dict.fromkeys(
        ("num_attention_heads", "num_key_value_heads", "head_dim", "attention_bias"), ("attention",)
    ),
    "intermediate_size": ("mlp",),
    "mlp_bias": ("mlp", "moe"),
    **dict.fromkeys(
        (
            *("n_routed_experts", "num_experts_per_tok", "moe_intermediate_size", "moe_latent_size"),
            *("moe_shared_expert_intermediate_size", "n_shared_experts", "n_group", "topk_group"),
            *("norm_topk_prob", "routed_scaling_factor"),
        ),
        ("moe",),
    ),
}
"""A normalised field → the layer kinds that it shapes; fields not listed concern every model."""

FIXED: dict[str, tuple[tuple[Any, ...], str]] = {
    "model_type": (("nemotron_h",), "only nemotron_h is understood"),
    "architectures": ((["NemotronHForCausalLM"],), "only the causal language model is understood"),
    "mlp_hidden_act": (("relu2",), "the MLPs and experts compute squared ReLU (relu2) only"),
    "mamba_hidden_act": (("silu",), "the convolution computes SiLU (silu) only"),
    "hidden_act": (("relu2", "silu"), "the family's activations are relu2 and silu"),
    "sliding_window": ((), "attention sees the whole context; a window is not supported"),
    "residual_in_fp32": ((False,), "the residual is kept in the model's dtype"),
    "is_encoder_decoder": ((False,), "the model has no encoder"),
    "is_decoder": ((False, True), "it must be true or false"),
    "add_cross_attention": ((False,), "the model has no cross attention"),
    "cross_attention_hidden_size": ((), "the model has no cross attention"),
    "output_router_logits": ((False,), "the router's logits are no output"),
    "output_attentions": ((False,), "attention's probabilities are no output"),
    "output_hidden_states": ((False,), "hidden states are no output"),
    "pruned_heads": (({},), "every head is computed"),
    "tie_encoder_decoder": ((False,), "the model has no encoder"),
}
"""A field → the values that the model computes, and what to say about any other; null is always allowed."""

_INITIAL = "it only shapes initial weights"
_FRAMEWORK = "it concerns the framework that wrote the file"
_NO_POSITIONS = "attention has no position encoding"
_MTP = "multi-token prediction is not exported"

INERT: dict[str, str] = {
    "expand": "the inner size is mamba_num_heads · mamba_head_dim",
    "chunk_size": "it cuts the same sum another way; the kernel chooses its own",
    "rope_theta": _NO_POSITIONS,
    "rope_scaling": _NO_POSITIONS,
    "rope_parameters": _NO_POSITIONS,
    "partial_rotary_factor": _NO_POSITIONS,
    "time_step_min": _INITIAL,
    "time_step_max": _INITIAL,
    "time_step_floor": _INITIAL,
    "mamba_proj_bias": "use_bias says whether a Mamba mixer's projections have one",
    "time_step_rank": "dt is projected at full rank in Mamba-2",
    "mamba_expand": "the inner size is mamba_num_heads · mamba_head_dim",
    "mamba_chunk_size": "it cuts the same sum another way; the kernel chooses its own",
    "mamba_dt_min": _INITIAL,
    "mamba_dt_max": _INITIAL,
    "mamba_dt_init_floor": _INITIAL,
    "rescale_prenorm_residual": _INITIAL,
    "initializer_range": _INITIAL,
    "attention_dropout": "inference drops nothing",
    "hidden_dropout": "inference drops nothing",
    "moe_shared_expert_overlap": "it schedules the shared expert, and changes no value",
    "mtp_hybrid_override_pattern": _MTP,
    "mtp_layers_block_type": _MTP,
    "num_logits_to_keep": "the caller names the rows that want logits",
    "use_cache": "the caller owns the caches",
    "use_mamba_kernels": _FRAMEWORK,
    "auto_map": _FRAMEWORK,
    "transformers_version": _FRAMEWORK,
    "_name_or_path": _FRAMEWORK,
    "name_or_path": _FRAMEWORK,
    "_attn_implementation_autoset": _FRAMEWORK,
    "attn_implementation": _FRAMEWORK,
    "return_dict": _FRAMEWORK,
    "torchscript": _FRAMEWORK,
    "chunk_size_feed_forward": "it cuts the same product another way",
    "id2label": "the model classifies nothing",
    "label2id": "the model classifies nothing",
    "problem_type": "the model classifies nothing",
    "finetuning_task": "the model classifies nothing",
}
"""A field that changes no output of this model → the reason."""
