"""Load: a checkpoint folder, understood and found complete, with no tensor read."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from nemotrt.exporter.artifacts import LoadedModel, WeightSource
from nemotrt.exporter.errors import BundleError, CheckpointError
from nemotrt.exporter.layer_selection import only_layers
from nemotrt.exporter.runtime.tokenizer import CHAT_TEMPLATE, TOKENIZER, Tokenizer
from nemotrt.exporter.tensor_files import StoredTensor, file_inside, open_checkpoint, read_json
from nemotrt.model.checkpoint import Source, TensorError, find, is_mtp, tensor_sources
from nemotrt.model.config import ConfigError, ModelConfig

FLOATING = ("float64", "float32", "float16", "bfloat16")
"""Dtypes that a weight may be stored in."""

QUANTISED = {"float8_e4m3fn": "FP8", "float8_e5m2": "FP8", "uint8": "4-bit"}
"""A dtype that only quantised weights have → what it is called."""

SCALES = ("weight_scale", "weight_scale_2", "input_scale", "k_scale", "v_scale")
"""Last parts of the names that quantisation adds to a checkpoint."""

SIDE_FILES = (
    "config.json",
    "generation_config.json",
    TOKENIZER,
    "tokenizer_config.json",
    "special_tokens_map.json",
    CHAT_TEMPLATE,
    "LICENSE",
    "NOTICE",
)
"""Files of the checkpoint that go into the bundle as they are, where present."""


@dataclass(frozen=True)
class Survey:
    """What a table of stored tensors gives a configuration, and all that stands in the way of an export."""

    weights: dict[str, WeightSource]
    """By parameter; those that are missing or misshapen left out."""
    not_exported: tuple[str, ...]
    problems: tuple[CheckpointError, ...]


def load(checkpoint: Path, layers: str = "") -> LoadedModel:
    """The configuration and where each parameter's bytes lie; raises CheckpointError on what is wrong.

    With `layers`, of the layers alone that `layer_selection` takes it to mean; raises UsageError where it means none.
    """
    config, stored = read_config(checkpoint), open_checkpoint(checkpoint)
    if layers:
        config, stored = only_layers(config, stored, layers)
    survey = match(config, stored)
    if survey.problems:
        first, others = survey.problems[0], len(survey.problems) - 1
        more = f" (nemo-export check lists {others} more problem{'s' * (others > 1)})" if others else ""
        raise CheckpointError(f"{first}{more}", hint=first.hint)
    check_side_files(checkpoint, config)
    return LoadedModel(
        folder=checkpoint,
        config=config,
        weights=survey.weights,
        not_exported=survey.not_exported,
        side_files=_side_files(checkpoint),
    )


def _side_files(checkpoint: Path) -> tuple[str, ...]:
    """Those that are there; a link that leads nowhere is, too, and is refused later."""
    paths = {name: checkpoint / name for name in SIDE_FILES}
    return tuple(name for name, path in paths.items() if path.is_file() or path.is_symlink())


def read_config(checkpoint: Path) -> ModelConfig:
    """The configuration of a checkpoint folder; raises CheckpointError that names the field."""
    if not checkpoint.is_dir():
        raise CheckpointError(f"{checkpoint} is not a folder", hint="name the folder that holds config.json")
    if not os.path.lexists(checkpoint / "config.json"):
        raise CheckpointError(
            f"{checkpoint} has no config.json", hint="name a checkpoint folder in the Hugging Face layout"
        )
    return parse_config(file_inside(checkpoint, "config.json"))


def parse_config(path: Path) -> ModelConfig:
    """The configuration in a file; raises CheckpointError that names the field."""
    try:
        config = ModelConfig.from_dict(read_json(path))
    except ConfigError as error:
        raise CheckpointError(f"{path}: {error}") from error
    outside = [token for token in config.eos_token_id if token >= config.vocab_size]
    if outside:
        raise CheckpointError(
            f"{path}: eos_token_id {outside[0]} is outside the vocabulary of {config.vocab_size} tokens"
        )
    return config


def check_side_files(checkpoint: Path, config: ModelConfig) -> None:
    """Raise CheckpointError when the tokenizer or another file that goes into the bundle is broken.

    A checkpoint without a tokenizer is whole: its bundle then takes token ids, and no text.
    """
    for name in _side_files(checkpoint):
        path = file_inside(checkpoint, name)
        if path.suffix == ".json":
            read_json(path)
    if TOKENIZER not in _side_files(checkpoint):
        return
    try:
        tokenizer = Tokenizer(checkpoint)
    except BundleError as error:
        raise CheckpointError(str(error), hint="copy the file from the model's repository again") from error
    if tokenizer.vocab_size > config.vocab_size:
        raise CheckpointError(
            f"{checkpoint / TOKENIZER} has {tokenizer.vocab_size} tokens, config.json {config.vocab_size}",
            hint="the tokenizer is another model's",
        )


def match(config: ModelConfig, stored: Mapping[str, StoredTensor]) -> Survey:
    """Each parameter's stored tensors, and every problem: quantised, missing, misshapen, extra."""
    quantised = {name for name, tensor in stored.items() if tensor.dtype in QUANTISED}
    shapes = {name: tensor.shape for name, tensor in stored.items()}
    for name in quantised:
        if stored[name].dtype == "uint8":  # two values a byte
            shapes[name] = (*shapes[name][:-1], shapes[name][-1] * 2)
    problems = _quantisation(config, stored, quantised)
    weights: dict[str, WeightSource] = {}
    used: set[str] = set()
    for parameter, source in tensor_sources(config).items():
        try:
            weights[parameter] = _find(parameter, source, stored, shapes)
            used.update(tensor.name for tensor in weights[parameter].tensors)
        except CheckpointError as error:
            problems.append(error)
            names = {name for names in (*source.names, source.stacked) for name in names}
            used.update(stored[name].name for name in names & stored.keys())
    unused = [name for name in sorted(stored) if stored[name].name not in used]
    extra = [name for name in unused if not is_mtp(name) and not (quantised and name.endswith(SCALES))]
    problems += [
        CheckpointError(
            f"{name} is in the checkpoint, but not in the model that config.json describes",
            hint="the configuration and the weights are of different models",
        )
        for name in extra
    ]
    return Survey(weights, tuple(name for name in unused if is_mtp(name)), tuple(problems))


def _quantisation(
    config: ModelConfig, stored: Mapping[str, StoredTensor], quantised: set[str]
) -> list[CheckpointError]:
    """One problem if any weight is quantised, or is said to be."""
    if quantised:
        first = min(quantised)
        more = f" and {len(quantised) - 1:,} more" if len(quantised) > 1 else ""
        what = QUANTISED[stored[first].dtype]
        message = f"the weights are quantised ({what}: {first}{more}), which this version cannot export"
        return [CheckpointError(message, hint="use the model's BF16 checkpoint")]
    if config.quantization is not None:
        return [
            CheckpointError(
                "quantization_config is set in config.json, but no stored tensor is quantised",
                hint="the configuration and the weights are of different checkpoints",
            )
        ]
    return []


def _find(
    parameter: str, source: Source, stored: Mapping[str, StoredTensor], shapes: Mapping[str, tuple[int, ...]]
) -> WeightSource:
    """The stored tensors of one parameter, in the order in which they are stacked."""
    try:
        tensors = tuple(stored[name] for name in find(source, shapes))
    except TensorError as error:
        raise CheckpointError(
            str(error), hint="the configuration and the weights do not belong together"
        ) from error
    for tensor in tensors:
        if tensor.dtype not in (*FLOATING, *QUANTISED):
            raise CheckpointError(
                f"{tensor.name} is stored as {tensor.dtype}, which is no weight format that this tool reads",
                hint="use the BF16, FP16 or FP32 checkpoint",
            )
    return WeightSource(parameter, tensors, source.transform)
