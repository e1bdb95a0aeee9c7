"""The fields of the family's config.json files: their aliases, their fixed values, and those without effect."""

from typing import Any

PATTERN = {"M": "mamba", "*": "attention", "-": "mlp", "E": "moe"}
"""The layer kind for each character of `hybrid_override_pattern`."""

LAYER_NAMES = {
    **{kind: kind for kind in PATTERN.values()},
    **{"linear_attention": "mamba", "full_attention": "attention"},
}
"""The layer kind for each name in `layers_block_type`: the published names and those of transformers 5."""

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
"""The names of a normalized field in a config.json; if several are present, their values must be equal."""

LAYER_FIELDS = {
    "hybrid_override_pattern": PATTERN,
    "layers_block_type": LAYER_NAMES,
    "layer_types": LAYER_NAMES,
}
"""The fields that list the model's layers, and the names of layer kinds in each."""

FIELDS_OF_KIND = {
    "mamba": (
        *("mamba_num_heads", "mamba_head_dim", "ssm_state_size", "n_groups", "conv_kernel"),
        *("use_conv_bias", "use_bias", "time_step_limit", "ssm_state_dtype"),
    ),
    "attention": ("num_attention_heads", "num_key_value_heads", "head_dim", "attention_bias"),
    "mlp": ("intermediate_size", "mlp_bias"),
    "moe": (
        *("n_routed_experts", "num_experts_per_tok", "moe_intermediate_size", "moe_latent_size"),
        *("moe_shared_expert_intermediate_size", "n_shared_experts", "n_group", "topk_group"),
        *("norm_topk_prob", "routed_scaling_factor", "mlp_bias"),
    ),
}
"""The normalized fields that matter only for layers of one kind; all others matter for every model."""

REQUIRED = {
    *("mamba_num_heads", "mamba_head_dim", "ssm_state_size", "n_groups", "conv_kernel"),
    *("num_attention_heads", "head_dim", "intermediate_size"),
    *("n_routed_experts", "num_experts_per_tok", "moe_intermediate_size"),
    "moe_shared_expert_intermediate_size",
}
"""Fields that must be present and positive if the model has a layer of their kind."""

FIXED: dict[str, tuple[tuple[Any, ...], str]] = {
    "mlp_hidden_act": (("relu2",), "the MLPs and experts compute squared ReLU (relu2) only"),
    "mamba_hidden_act": (("silu",), "the convolution computes SiLU (silu) only"),
    "hidden_act": (("relu2", "silu"), "the family's activations are relu2 and silu"),
    "sliding_window": ((), "attention covers the whole context; a sliding window is not supported"),
    "is_encoder_decoder": ((False,), "the model has no encoder"),
    "is_decoder": ((False, True), "it must be true or false"),
    "add_cross_attention": ((False,), "the model has no cross attention"),
    "cross_attention_hidden_size": ((), "the model has no cross attention"),
    "output_router_logits": ((False,), "the router's logits are not an output"),
    "output_attentions": ((False,), "attention probabilities are not an output"),
    "output_hidden_states": ((False,), "hidden states are not an output"),
    "pruned_heads": (({},), "pruned heads are not supported"),
    "tie_encoder_decoder": ((False,), "the model has no encoder"),
    **dict.fromkeys(
        (
            *("bad_words_ids", "suppress_tokens", "begin_suppress_tokens", "forced_bos_token_id"),
            *("forced_eos_token_id", "exponential_decay_length_penalty"),
        ),
        ((), "no token is forced or forbidden when text is generated"),
    ),
}
"""The supported values of a field, and the reason given for refusing any other; null is always allowed."""

_INERT = {
    "the inner size is mamba_num_heads · mamba_head_dim": ("expand", "mamba_expand"),
    "it only splits the computation; the kernel chooses its own chunk size": (
        "chunk_size",
        "mamba_chunk_size",
    ),
    "attention has no position encoding": (
        *("rope_theta", "rope_scaling", "rope_parameters", "partial_rotary_factor"),
    ),
    "it only affects the initial weights": (
        *("time_step_min", "time_step_max", "time_step_floor", "mamba_dt_min", "mamba_dt_max"),
        *("mamba_dt_init_floor", "rescale_prenorm_residual", "initializer_range"),
    ),
    "use_bias decides whether the Mamba projections have a bias": ("mamba_proj_bias",),
    "dt is projected at full rank in Mamba-2": ("time_step_rank",),
    "there is no dropout in inference": ("attention_dropout", "hidden_dropout"),
    "it only affects training": (
        *("gradient_checkpointing", "router_aux_loss_coef", "router_z_loss_coef", "router_jitter_noise"),
        "aux_loss_alpha",
    ),
    "the caller chooses how to sample": (
        *("do_sample", "temperature", "top_k", "top_p", "typical_p", "num_beams", "num_beam_groups"),
        *("max_length", "min_length", "early_stopping", "num_return_sequences", "repetition_penalty"),
        *("length_penalty", "diversity_penalty", "no_repeat_ngram_size", "encoder_no_repeat_ngram_size"),
        *("output_scores", "return_dict_in_generate", "remove_invalid_values"),
    ),
    "the tokenizer's files name the special tokens": (
        *("unk_token_id", "sep_token_id", "cls_token_id", "mask_token_id", "decoder_start_token_id"),
    ),
    "it only schedules the shared expert": ("moe_shared_expert_overlap",),
    "multi-token prediction is not exported": ("mtp_hybrid_override_pattern", "mtp_layers_block_type"),
    "the caller chooses the rows that get logits": ("num_logits_to_keep",),
    "the caller manages the caches": ("use_cache",),
    "it only concerns the framework that wrote the file": (
        *("use_mamba_kernels", "auto_map", "transformers_version", "_name_or_path", "name_or_path"),
        *("_attn_implementation", "_attn_implementation_internal", "_attn_implementation_autoset"),
        *("attn_implementation", "_experts_implementation", "_flash_attn_2_enabled", "_commit_hash"),
        *("return_dict", "use_return_dict", "torchscript", "use_bfloat16", "tf_legacy_loss"),
        *("tokenizer_class", "processor_class", "prefix", "task_specific_params"),
        *("unsloth_version", "unsloth_fixed"),
    ),
    "it only splits the computation": ("chunk_size_feed_forward", "pretraining_tp"),
    "the model is not a classifier": ("id2label", "label2id", "problem_type", "finetuning_task"),
}

INERT = {name: reason for reason, names in _INERT.items() for name in names}
"""The fields that change no output of this model, each with the reason."""
