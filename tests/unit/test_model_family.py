"""Another model is called by its name, before any of its fields is judged."""

from __future__ import annotations

from typing import Any

import pytest
from published_configs import NANO, SUPER

from nemotrt.model.config import ModelConfig
from nemotrt.model.config_values import ConfigError

LLAMA = {"model_type": "llama", "architectures": ["LlamaForCausalLM"]}
MULTIMODAL: dict[str, Any] = {
    "model_type": "NemotronH_Nano_VL_V2",
    "architectures": ["NemotronH_Nano_VL_V2"],
    "downsample_ratio": 0.5,
    "llm_config": NANO,
}


@pytest.mark.parametrize(
    ("raw", "message", "hint"),
    [
        (
            LLAMA | {"rope_scaling": {}},
            'model_type is "llama": only nemotron_h',
            "Nemotron-H, Nemotron Nano 2",
        ),
        (
            {"model_type": "nemotron-nas", "architectures": ["DeciLMForCausalLM"], "block_configs": []},
            'model_type is "nemotron-nas": it is Llama-Nemotron',
            "have model_type nemotron_h",
        ),
        ({"architectures": ["DeciLMForCausalLM"], "block_configs": []}, "it is Llama-Nemotron", "Nano 2"),
        ({"model_type": "nemotron_h_puzzle", "block_configs": []}, "it is Nemotron Puzzle", "Nano 2"),
        (SUPER | {"architectures": ["NemotronHPuzzleForCausalLM"]}, "it is Nemotron Puzzle", "Nano 2"),
        ({"model_type": "nemotron", "partial_rotary_factor": 0.5}, "it is Nemotron-4 or Minitron", "Nano 2"),
        (MULTIMODAL, 'model_type is "NemotronH_Nano_VL_V2": it is a multimodal', "llm_config as config.json"),
        (
            MULTIMODAL | {"model_type": "NemotronH_Nano_Omni_Reasoning_V3", "sound_config": {}},
            'model_type is "NemotronH_Nano_Omni_Reasoning_V3": it is a multimodal model',
            "llm_config as config.json",
        ),
        (
            {"model_type": "llava", "text_config": LLAMA, "vision_config": {}},
            'model_type is "llava": it is a multimodal model',
            'its language model (text_config) is "llama", which is not supported either',
        ),
        (
            SUPER | {"architectures": ["NemotronHForSequenceClassification"]},
            "only the causal language model",
            "its architecture is NemotronHForCausalLM",
        ),
        (
            {"model_type": ["nemotron_h"], "unknown": 1},
            'model_type is ["nemotron_h"]',
            "model_type nemotron_h",
        ),
        (SUPER | {"architectures": [{}], "unknown": 1}, "architectures is [{}]", "NemotronHForCausalLM"),
    ],
    ids=lambda value: "" if isinstance(value, str) else str(value.get("model_type", "no type")),
)
def test_another_model_is_named_before_any_of_its_fields(
    raw: dict[str, Any], message: str, hint: str
) -> None:
    with pytest.raises(ConfigError) as error:
        ModelConfig.from_dict(raw)
    assert message in str(error.value)
    assert hint in error.value.hint


def test_the_language_model_of_a_multimodal_model_is_a_model_of_this_family() -> None:
    assert ModelConfig.from_dict(MULTIMODAL["llm_config"]) == ModelConfig.from_dict(NANO)
