"""Checkpoints whose config.json, tokenizer or other small files are invalid."""

from __future__ import annotations

from checkpoints import CONFIG

from bad_checkpoints.damage import Case, added_head, linked_license, text, tokenizer

CONFIGS = {
    "config-missing": Case("has no config.json", lambda folder: (folder / "config.json").unlink()),
    "config-not-json": Case("config.json is not valid JSON", text("config.json", "{'model_type': 1}")),
    "config-not-text": Case("config.json is not valid JSON", text("config.json", b"\xff\xfe\x00")),
    "config-not-an-object": Case("config.json is not a JSON object", text("config.json", "[]")),
    "config-duplicate-key": Case(
        "duplicate key vocab_size", text("config.json", '{"vocab_size": 1, "vocab_size": 2}')
    ),
    "config-misspelt": Case(
        "hiden_size is not a field of this model family; did you mean hidden_size", config={"hiden_size": 32}
    ),
    "config-fp32-residual": Case(
        "residual_in_fp32 is true, but the residual of this build is BF16",
        config={"residual_in_fp32": True},
        options=("--precision", "bf16"),
    ),
    "config-field-not-ignorable": Case(
        "--ignore-field hidden_size has no effect", options=("--ignore-field", "hidden_size"), code=2
    ),
    "config-unknown": Case("hyper_connections is not a field", config={"hyper_connections": 4}),
    "config-field-with-a-line-break": Case("x y is not a field", config={"x\ny": 1}),
    "config-field-without-a-name": Case('"" is not a field', config={"": 1}),
    "config-other-model": Case('model_type is "llama"', config={"model_type": "llama"}),
    "config-llama-nemotron": Case(
        'model_type is "nemotron-nas": it is Llama-Nemotron',
        config={"model_type": "nemotron-nas", "architectures": ["DeciLMForCausalLM"], "block_configs": []},
    ),
    "config-puzzle": Case(
        "it is Nemotron Puzzle, whose layers differ in size",
        config={"architectures": ["NemotronHPuzzleForCausalLM"], "block_configs": []},
    ),
    "config-multimodal": Case(
        'model_type is "NemotronH_Nano_VL_V2": it is a multimodal model',
        config={"model_type": "NemotronH_Nano_VL_V2", "llm_config": CONFIG, "downsample_ratio": 0.5},
    ),
    "config-of-fsdp": Case(
        r'architectures is \["FSDPNemotronHForCausalLM"\]: FSDP has left its own name',
        config={"architectures": ["FSDPNemotronHForCausalLM"]},
    ),
    "config-of-peft": Case(
        r'architectures is \["PeftModelForCausalLM"\]: PEFT has left its own name',
        config={"architectures": ["PeftModelForCausalLM"]},
    ),
    "config-of-torch-compile": Case(
        r'architectures is \["OptimizedModule"\]: torch.compile has left its own name',
        config={"architectures": ["OptimizedModule"]},
    ),
    "config-field-missing": Case("ssm_state_size is missing", config={"ssm_state_size": None}),
    "config-contradictory": Case(
        "num_hidden_layers is 7, but hybrid_override_pattern has 6", config={"num_hidden_layers": 7}
    ),
    "config-two-names": Case("two names of one field must have the same value", config={"mamba_n_groups": 4}),
    "config-unknown-layer": Case('holds "X"', config={"hybrid_override_pattern": "MXM"}),
    "config-no-layers": Case("the model has no layer", config={"hybrid_override_pattern": ""}),
    "config-silu-experts": Case('mlp_hidden_act is "silu"', config={"mlp_hidden_act": "silu"}),
    "config-experts-by-groups": Case(
        "n_routed_experts 4 is not a multiple of n_group 3", config={"n_group": 3, "topk_group": 1}
    ),
    "config-too-many-experts-chosen": Case(
        "num_experts_per_tok 9 is more than n_routed_experts 4", config={"num_experts_per_tok": 9}
    ),
    "config-heads-by-kv-heads": Case(
        "num_attention_heads 4 is not a multiple of num_key_value_heads 3", config={"num_key_value_heads": 3}
    ),
    "config-window": Case("sliding_window is 4096", config={"sliding_window": 4096}),
    "config-text-for-number": Case('hidden_size is "32"', config={"hidden_size": "32"}),
    "config-size-beyond-int32": Case(
        "conv_kernel is 2147483648; it must be a whole number from 0 to 2147483647",
        config={"conv_kernel": 1 << 31},
    ),
    "config-number-beyond-fp32": Case(
        "norm_eps is 10*…; it must be a finite FP32 number", config={"norm_eps": 10**400}
    ),
    "config-million-experts": Case(
        "n_routed_experts 1000000 makes 2000000 experts in all; at most 262144 are supported",
        config={"n_routed_experts": 1_000_000},
    ),
    "config-not-finite": Case("norm_eps is Infinity", config={"norm_eps": float("inf")}),
    "config-other-weights": Case(
        r"embeddings\.weight has shape \[96, 32\].* lists \d+ more problems", config={"hidden_size": 64}
    ),
    "tied-head-differs": Case(
        "lm_head.weight differs from backbone.embeddings.weight",
        added_head,
        config={"tie_word_embeddings": True},
    ),
    "config-end-token": Case("eos_token_id 96 is outside the vocabulary", config={"eos_token_id": 96}),
    "tokenizer-broken": Case(
        "tokenizer.json is not a tokenizer",
        tokenizer(text("tokenizer.json", '{"version": "1.0"}')),
        model={"vocab_size": 1024},
    ),
    "tokenizer-not-json": Case(
        "tokenizer.json is not valid JSON", tokenizer(text("tokenizer.json", "{")), model={"vocab_size": 1024}
    ),
    "tokenizer-of-another-model": Case(
        r"tokenizer.json has \d+ tokens, config.json 96", tokenizer(lambda _: None)
    ),
    "generation-config-broken": Case(
        "eos_token_id is end, not token ids",
        tokenizer(text("generation_config.json", '{"eos_token_id": "end"}')),
        model={"vocab_size": 1024},
    ),
    "license-through-link": Case("LICENSE is a link to .* outside the checkpoint", linked_license),
}
