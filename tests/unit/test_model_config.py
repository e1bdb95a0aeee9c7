"""Published configurations parse to what they describe; anything else is refused by name."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from published_configs import H_8B, NANO, NANO_9B, PUBLISHED, SUPER
from transformers import NemotronHConfig

from nemotrt.model.config import ModelConfig
from nemotrt.model.config_fields import ALIASES, FIXED, INERT
from nemotrt.model.config_values import LARGEST, ConfigError
from nemotrt.model.family import FIELDS
from nemotrt.model.hybrid import NemotronH

BILLIONS = {"nano": 31.578, "super": 120.669, "h-56b": 56.324, "h-8b": 8.101, "nano-9b-v2": 8.888}
"""Parameters, multi-token prediction left out; the published figures are 31.6, 120.7, 56, 8 and 9."""


def refused(raw: dict[str, Any]) -> str:
    with pytest.raises(ConfigError) as error:
        ModelConfig.from_dict(raw)
    return str(error.value)


@pytest.mark.parametrize("name", PUBLISHED)
def test_a_published_config_describes_the_published_model(name: str) -> None:
    config = ModelConfig.from_dict(PUBLISHED[name])
    model = NemotronH(config, dtype=torch.bfloat16, device="meta")
    scales = sum(p.numel() for key, p in model.named_parameters() if key.endswith("_scale"))
    assert sum(p.numel() for p in model.parameters()) - scales == pytest.approx(
        BILLIONS[name] * 1e9, rel=1e-4
    )


def test_what_super_is() -> None:
    config = ModelConfig.from_dict(SUPER)
    assert [config.layers.count(kind) for kind in ("mamba", "moe", "attention", "mlp")] == [40, 40, 8, 0]
    assert config.layers[7] == "attention"
    assert (config.expert_size, config.moe_latent_size) == (1024, 1024)
    assert (config.mamba_inner_size, config.conv_channels) == (8192, 10240)
    assert config.time_step_limit == (0.0, LARGEST)
    assert math.isfinite(config.time_step_limit[1])
    assert (config.dtype, config.ssm_state_dtype) == ("bfloat16", "float32")
    assert (config.num_mtp_layers, config.eos_token_id) == (1, (2,))
    assert config.inert["rope_theta"] == "attention has no position encoding"
    assert config.inert["intermediate_size"] == "the model has no mlp layer"


@pytest.mark.parametrize(
    "limit", [[0.0, math.inf], [0, 1e308], [0.0, {"__float__": "Infinity"}], (0.0, LARGEST)]
)
def test_no_limit_is_written_in_many_ways(limit: Any) -> None:
    raw = json.loads(json.dumps(SUPER | {"time_step_limit": limit}))
    assert ModelConfig.from_dict(raw).time_step_limit == (0.0, LARGEST)


def test_a_list_of_layers_stands_for_the_pattern_and_their_number_follows() -> None:
    listed = {"M": "mamba", "E": "moe", "*": "attention", "-": "mlp"}
    renamed = listed | {"M": "linear_attention", "*": "full_attention"}
    pattern = SUPER["hybrid_override_pattern"]
    raw = {k: v for k, v in SUPER.items() if k not in ("hybrid_override_pattern", "num_hidden_layers")}
    for names in (listed, renamed):
        config = ModelConfig.from_dict(raw | {"layers_block_type": [names[c] for c in pattern]})
        assert config == ModelConfig.from_dict(SUPER)
        both = SUPER | {"layers_block_type": [names[c] for c in pattern]}
        assert ModelConfig.from_dict(both) == ModelConfig.from_dict(SUPER)
    other = ["mamba"] * len(pattern)
    assert "different layers" in refused(SUPER | {"layers_block_type": other})


@pytest.mark.parametrize("raw", [NANO, NANO_9B, SUPER, H_8B], ids=["nano", "nano-9b-v2", "super", "h-8b"])
def test_what_transformers_makes_of_a_config_means_the_same(raw: dict[str, Any], tmp_path: Path) -> None:
    """It drops num_hidden_layers and the pattern, renames layer kinds and tags infinity."""
    fields = {name: value for name, value in raw.items() if name != "model_type"}
    NemotronHConfig(**fields).save_pretrained(tmp_path)
    saved = json.loads((tmp_path / "config.json").read_text())
    assert "hybrid_override_pattern" not in saved
    assert "num_hidden_layers" not in saved
    again = ModelConfig.from_dict(saved)
    config = ModelConfig.from_dict(raw)
    filled_in = {"pad_token_id", "bos_token_id", "eos_token_id"} - raw.keys()
    differing = {name for name in vars(config) if vars(config)[name] != vars(again)[name]}
    assert differing - {"inert"} <= filled_in


def test_every_field_of_transformers_is_known() -> None:
    known = {name for names in ALIASES.values() for name in names} | {*INERT, *FIXED, *FIELDS}
    known.add("quantization_config")
    known |= {"layers_block_type", *vars(ModelConfig.from_dict(SUPER))}
    written = set(json.loads(NemotronHConfig().to_json_string(use_diff=False)))
    assert written - known == set()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"hiden_size": 4096}, "hiden_size is not a field of this model family; did you mean hidden_size?"),
        ({"qk_layernorm": True}, "qk_layernorm is not a field of this model family, so what it asks for is"),
        ({"mlp_hidden_act": "silu"}, 'mlp_hidden_act is "silu": the MLPs and experts compute squared ReLU'),
        ({"mamba_hidden_act": "gelu"}, 'mamba_hidden_act is "gelu"'),
        ({"sliding_window": 4096}, "sliding_window is 4096: attention covers the whole context"),
        ({"num_hidden_layers": 87}, "num_hidden_layers is 87, but hybrid_override_pattern has 88 layers"),
        (
            {"hybrid_override_pattern": "MX"},
            'hybrid_override_pattern holds "X"; the layer kinds are M, *, -, E',
        ),
        ({"hybrid_override_pattern": ""}, "the model has no layer"),
        ({"hybrid_override_pattern": None}, "neither hybrid_override_pattern nor layers_block_type lists"),
        ({"layers_block_type": "MEM"}, "layers_block_type is not a list"),
        ({"attention_head_dim": 64}, "head_dim is 128 and attention_head_dim is 64: two names of one field"),
        ({"rms_norm_eps": 1e-6}, "layer_norm_epsilon is 1e-05 and rms_norm_eps is 1e-06: two names"),
        ({"torch_dtype": "float16"}, 'dtype is "bfloat16" and torch_dtype is "float16": two names'),
        (
            {"dtype": "float8_e4m3fn"},
            'dtype is "float8_e4m3fn"; it must be one of float32, float16, bfloat16',
        ),
        ({"mamba_ssm_cache_dtype": "bfloat16"}, "the recurrent state is float32 or float16"),
        ({"mamba_num_heads": 129}, "mamba_num_heads 129 is not a multiple of n_groups 8"),
        ({"conv_kernel": 1}, "conv_kernel is 1"),
        ({"num_key_value_heads": 3}, "num_attention_heads 32 is not a multiple of num_key_value_heads 3"),
        ({"num_experts_per_tok": 513}, "num_experts_per_tok 513 is more than n_routed_experts 512"),
        ({"n_group": 3}, "n_routed_experts 512 is not a multiple of n_group 3"),
        ({"n_group": 0}, "n_group is 0"),
        ({"n_group": 4, "topk_group": 5}, "topk_group is 5; it must be between 1 and n_group 4"),
        (
            {"n_group": 64, "topk_group": 2},
            "num_experts_per_tok 22 is more than the 16 experts of topk_group 2",
        ),
        ({"n_shared_experts": 2}, "n_shared_experts is 2"),
        ({"mamba_proj_bias": True}, "mamba_proj_bias is set, but use_bias, which takes effect, is not"),
        ({"hidden_size": None}, "hidden_size is missing"),
        ({"ssm_state_size": None}, "ssm_state_size is missing"),
        ({"hidden_size": 0}, "hidden_size is 0; it must be at least 1"),
        ({"hidden_size": "4096"}, 'hidden_size is "4096"; it must be a whole number'),
        (
            {"hidden_size": 1 << 31},
            "hidden_size is 2147483648; it must be a whole number from 0 to 2147483647",
        ),
        ({"intermediate_size": 10**400, "hidden_size": 10**400}, f"hidden_size is 1{'0' * 59}…; it must be"),
        ({"n_routed_experts": 1 << 17}, "experts in all; at most 262144 are supported"),
        (
            {"hybrid_override_pattern": "M" * 4097, "num_hidden_layers": 4097},
            "the model has 4097 layers; at most 4096 are supported",
        ),
        ({"hidden_size": True}, "hidden_size is true; it must be a whole number"),
        ({"use_conv_bias": 1}, "use_conv_bias is 1; it must be true or false"),
        (
            {"routed_scaling_factor": math.inf},
            "routed_scaling_factor is Infinity; it must be a finite FP32 number",
        ),
        (
            {"routed_scaling_factor": 1e39},
            "routed_scaling_factor is 1e+39; it must be a finite FP32 number",
        ),
        ({"routed_scaling_factor": 10**400}, "…; it must be a finite FP32 number"),
        ({"time_step_limit": [-(10**400), 1]}, "…; it must be a finite FP32 number"),
        ({"layer_norm_epsilon": 0.0, "norm_eps": 0.0}, "layer_norm_epsilon is 0.0; it must be between"),
        ({"time_step_limit": [0.5, 0.1]}, "time_step_limit is [0.5, 0.1]; it must be two increasing numbers"),
        ({"time_step_limit": [math.nan, 1.0]}, "time_step_limit is NaN; it must be a finite FP32 number"),
        ({"time_step_limit": 0.1}, "time_step_limit is 0.1; it must be two numbers"),
        ({"quantization_config": "fp8"}, 'quantization_config is "fp8"; it must be a JSON object'),
    ],
    ids=lambda value: "" if isinstance(value, str) else ",".join(value),
)
def test_what_cannot_be_meant_is_refused_by_name(change: dict[str, Any], message: str) -> None:
    assert message in refused(SUPER | change)


def test_a_field_for_a_layer_kind_that_is_absent_is_inert() -> None:
    config = ModelConfig.from_dict(NANO_9B | {"n_routed_experts": 8, "moe_latent_size": 64})
    assert config.n_routed_experts == 0
    assert config.inert["n_routed_experts"] == config.inert["moe_latent_size"] == "the model has no moe layer"


def test_names_that_other_writers_use() -> None:
    renamed = {
        name: value for name, value in NANO_9B.items() if name not in ("n_groups", "num_key_value_heads")
    }
    renamed |= {"mamba_n_groups": 8, "num_query_groups": 8, "eos_token_id": [2, 12]}
    config = ModelConfig.from_dict(renamed)
    assert (config.n_groups, config.num_key_value_heads, config.eos_token_id) == (8, 8, (2, 12))


def test_quantization_is_handed_on_as_it_stands() -> None:
    raw = {"quant_method": "modelopt", "quant_algo": "FP8"}
    assert ModelConfig.from_dict(SUPER | {"quantization_config": raw}).quantization == raw
