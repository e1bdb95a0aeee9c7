"""Read and check a checkpoint's files other than its weights: configuration, tokenizer, license."""

import json
import os
import re
import shlex
from collections.abc import Collection, Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path

from nemotrt.exporter.checkpoint.other_formats import other_format
from nemotrt.exporter.checkpoint.quant_config import HF_QUANT_CONFIG
from nemotrt.exporter.checkpoint.safetensors_reader import file_inside, read_json
from nemotrt.exporter.config import Precision
from nemotrt.exporter.errors import BundleError, CheckpointError, UsageError
from nemotrt.exporter.generation.tokenizer import CHAT_TEMPLATE, TOKENIZER, Tokenizer, stored_end_tokens
from nemotrt.exporter.generation.tokenizer_program import try_tokenizer
from nemotrt.model.config import ModelConfig, UnknownFieldsError
from nemotrt.model.config_values import ConfigError

AUTO_MAPS = ("config.json", "tokenizer_config.json")
"""Files that may have an `auto_map`."""

RELATIVE_IMPORT = re.compile(r"^\s*from\s+\.(\w+)\s+import\b", re.MULTILINE)

SAMPLE = "Hello"
"""A text that a tokenizer and a chat template must accept."""

SIDE_FILES = (
    "config.json",
    HF_QUANT_CONFIG,
    "generation_config.json",
    TOKENIZER,
    "tokenizer_config.json",
    "special_tokens_map.json",
    CHAT_TEMPLATE,
    "LICENSE",
    "NOTICE",
)
"""Files that a bundle copies unchanged from the checkpoint, if it has them."""


def side_files(checkpoint: Path) -> tuple[str, ...]:
    """The names of the side files in the folder, even of broken links and folders, which `check_side_files` refuses."""
    return tuple(name for name in SIDE_FILES if os.path.lexists(checkpoint / name))


def code_files(checkpoint: Path) -> tuple[str, ...]:
    """The Python files that transformers runs with `trust_remote_code`, and those that they import; never run here.

    `auto_map` names them as MODULE.CLASS. REPOSITORY--MODULE.CLASS is not a file of the checkpoint.
    """
    maps = (
        read_json(checkpoint / name).get("auto_map") for name in AUTO_MAPS if (checkpoint / name).is_file()
    )
    classes = re.findall(r'"([\w.]+)\.\w+"', json.dumps([*maps]))
    waiting, found = [f"{module}.py" for module in classes], set[str]()
    while waiting:
        name = waiting.pop()
        if name in found or not os.path.exists(checkpoint / name):  # False if the name is too long, too
            continue
        found.add(name)
        code = file_inside(checkpoint, name).read_text(encoding="utf-8", errors="replace")
        waiting += [f"{module}.py" for module in RELATIVE_IMPORT.findall(code)]
    return tuple(sorted(found))


def read_config(checkpoint: Path, ignore_fields: Collection[str] = ()) -> ModelConfig:
    """The configuration of a checkpoint folder; raises CheckpointError that names the field."""
    if not checkpoint.is_dir():
        raise CheckpointError(f"{checkpoint} is not a folder", hint="pass the folder that has config.json")
    if not os.path.lexists(checkpoint / "config.json"):
        raise other_format(checkpoint) or CheckpointError(
            f"{checkpoint} has no config.json", hint="pass a checkpoint folder in the Hugging Face layout"
        )
    return parse_config(file_inside(checkpoint, "config.json"), ignore_fields)


def parse_config(path: Path, ignore_fields: Collection[str] = ()) -> ModelConfig:
    """The configuration in a file; raises CheckpointError that names the field."""
    try:
        config = ModelConfig.from_dict(read_json(path), ignore_fields)
    except UnknownFieldsError as error:
        flags = " ".join(f"--ignore-field {shlex.quote(name)}" for name in error.names)
        raise CheckpointError(
            f"{path}: {error}", hint=f"if the model computes the same without it, use {flags}"
        ) from error
    except ConfigError as error:
        raise CheckpointError(f"{path}: {error}", hint=error.hint) from error
    bos = () if config.bos_token_id is None else (config.bos_token_id,)
    for name, tokens in (("eos_token_id", config.eos_token_id), ("bos_token_id", bos)):
        _check_ids(f"{path}: {name}", tokens, config)
    return config


def _check_ids(what: str, tokens: Iterable[int], config: ModelConfig) -> None:
    for token in tokens:
        if not 0 <= token < config.vocab_size:
            raise CheckpointError(f"{what} {token} is outside the vocabulary of {config.vocab_size} tokens")


def check_ignored(config: ModelConfig, ignore_fields: Collection[str]) -> None:
    """Raise UsageError if config.json does not have a field that the user asked to ignore, or if it cannot be."""
    for name in ignore_fields:
        if name not in config.ignored_fields:
            raise UsageError(
                f"--ignore-field {name} has no effect",
                hint="it is for a field of config.json that is unknown",
            )


def check_residual(config: ModelConfig, precision: str) -> None:
    """Raise CheckpointError if config.json asks for an FP32 residual in a model of another precision."""
    if config.residual_in_fp32 and precision != Precision.FP32:
        raise CheckpointError(
            f"residual_in_fp32 is true, but the residual of this build is {Precision(precision).dtype.label}",
            hint="use --precision fp32, or --ignore-field residual_in_fp32 to compute as transformers 5 does",
        )


def check_side_files(checkpoint: Path, config: ModelConfig) -> dict[str, frozenset[int]]:
    """The end-of-text tokens by the file that names them; raises CheckpointError when a side file is broken.

    A checkpoint may have no tokenizer: its bundle then takes token ids only.
    """
    names = side_files(checkpoint)
    for name in names:
        path = file_inside(checkpoint, name)
        if path.suffix == ".json":
            read_json(path)
    with _faults_of_the_checkpoint("copy the file from the model's repository again"):
        if TOKENIZER in names:
            try_tokenizer(checkpoint, SAMPLE)
        tokenizer = Tokenizer(checkpoint) if TOKENIZER in names else None
        end_tokens = tokenizer.end_tokens if tokenizer else stored_end_tokens(checkpoint)
    for name, ids in end_tokens.items():
        _check_ids(f"{checkpoint / name}: eos_token_id", ids, config)
    if tokenizer:
        _check_tokens(tokenizer, checkpoint / TOKENIZER, config)
        with _faults_of_the_checkpoint("correct it, or remove it to build a bundle without one"):
            _check_template(tokenizer)
    return end_tokens


@contextmanager
def _faults_of_the_checkpoint(hint: str) -> Iterator[None]:
    try:
        yield
    except BundleError as error:
        raise CheckpointError(str(error), hint=hint) from error


def _check_tokens(tokenizer: Tokenizer, path: Path, config: ModelConfig) -> None:
    """Raise CheckpointError on more tokens than the model has, and on an id that it does not have."""
    hint = "the tokenizer belongs to another model"
    if tokenizer.vocab_size > config.vocab_size:
        raise CheckpointError(
            f"{path} has {tokenizer.vocab_size} tokens, config.json {config.vocab_size}", hint=hint
        )
    for token in tokenizer.outside(config.vocab_size):
        raise CheckpointError(
            f"{path}: {token} is outside the vocabulary of {config.vocab_size} tokens", hint=hint
        )


def _check_template(tokenizer: Tokenizer) -> None:
    """Raise BundleError if the chat template fails on the simplest conversation; it may refuse that one."""
    with suppress(UsageError):
        if tokenizer.has_template:
            tokenizer.render([[{"role": "user", "content": SAMPLE}]])


def end_token_notes(end_tokens: Mapping[str, frozenset[int]]) -> tuple[str, ...]:
    """A note for the user when the files name different end-of-text tokens."""
    if len(set(end_tokens.values())) < 2:
        return ()
    listed = "; ".join(
        f"{name}: {', '.join(map(str, sorted(ids))) or 'a token that ' + TOKENIZER + ' does not have'}"
        for name, ids in end_tokens.items()
    )
    return (f"the files name different end-of-text tokens ({listed}): generate stops at each of them",)
