"""Judges `model_type` and `architectures` before any other field, so that another model is called by its name."""

import json
from collections.abc import Iterator
from typing import Any

FIELDS = ("model_type", "architectures")
MODEL_TYPE, ARCHITECTURE = "nemotron_h", "NemotronHForCausalLM"

_RELATIVES = {
    ("nemotron_h_puzzle", "NemotronHPuzzleForCausalLM"): "Nemotron Puzzle, whose layers differ in size",
    ("nemotron-nas", "DeciLMForCausalLM"): "Llama-Nemotron, a Transformer without Mamba layers",
    ("nemotron", "NemotronForCausalLM"): "Nemotron-4 or Minitron, a Transformer without Mamba layers",
}

RELATIVES = {name: model for names, model in _RELATIVES.items() for name in names}
"""`model_type` or architecture → what the model is, for models that are easily taken for one of this family."""

SUPPORTED = f"Nemotron-H, Nemotron Nano 2 and Nemotron 3 have model_type {MODEL_TYPE}"

_REPAIR = (
    f'if the weights are those of the whole model, write "architectures": ["{ARCHITECTURE}"] in config.json'
)

WRAPPERS = {
    f"FSDP{ARCHITECTURE}": "FSDP",
    "FullyShardedDataParallel": "FSDP",
    "DistributedDataParallel": "DistributedDataParallel",
    "DeepSpeedEngine": "DeepSpeed",
    "OptimizedModule": "torch.compile",
    "PeftModel": "PEFT",
    "PeftModelForCausalLM": "PEFT",
}
"""Architecture that a training tool writes instead of the model's → the tool."""

LANGUAGE_PARTS = ("llm_config", "text_config", "language_config")
"""Fields in which a multimodal model's config.json holds the configuration of its language model."""


def other_model(raw: dict[str, Any]) -> tuple[str, str] | None:
    """What a config.json of another model is, and what to do; None if it names this family or no model at all."""
    model_type, architectures = (raw.get(field) for field in FIELDS)
    if model_type not in (None, MODEL_TYPE):
        named = f"model_type is {json.dumps(model_type)}"
    elif architectures not in (None, [ARCHITECTURE]):
        named = f"architectures is {json.dumps(architectures)}"
    else:
        return None
    for field in LANGUAGE_PARTS:
        if isinstance(part := raw.get(field), dict):
            return f"{named}: it is a multimodal model, and only language models are supported", _advice(
                field, part
            )
    for name in _names(raw):
        if name in WRAPPERS:
            return f"{named}: {WRAPPERS[name]} has left its own name", _REPAIR
        if name in RELATIVES:
            return f"{named}: it is {RELATIVES[name]}, which is not supported", SUPPORTED
    if model_type == MODEL_TYPE:
        return f"{named}: only the causal language model is supported", f"its architecture is {ARCHITECTURE}"
    return f"{named}: only {MODEL_TYPE} is supported", SUPPORTED


def _names(raw: dict[str, Any]) -> Iterator[str]:
    for value in (raw.get(field) for field in FIELDS):
        yield from (name for name in (value if isinstance(value, list) else [value]) if isinstance(name, str))


def _advice(field: str, part: dict[str, Any]) -> str:
    if part.get("model_type") != MODEL_TYPE:
        return f"its language model ({field}) is {json.dumps(part.get('model_type'))}, which is not supported either"
    return (
        f"its language model is {MODEL_TYPE} and can be exported alone: make a folder with {field} as config.json and"
        " the tensors of the language model, without the prefix of their names"
    )
