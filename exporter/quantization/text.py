"""Text that a model is calibrated or judged on, as sequences of its tokens."""

from __future__ import annotations

import json
from collections.abc import Iterator
from importlib import resources
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from nemotrt.exporter.errors import UsageError
from nemotrt.exporter.generation.tokenizer import TOKENIZER, Tokenizer

BUILT_IN, EVALUATION = "calibration.txt", "evaluation.txt"
"""In the package; written for this project and under its licence. Nothing is calibrated on the second."""

SEQUENCE = 512
"""Tokens of a sequence: longer texts are cut."""
LEAST = 256
"""Tokens in all below which ranges and figures mean nothing."""
MOST = 16_384
"""Tokens in all that are taken; the rest is left out, and said to be."""

Sequences = tuple[NDArray[np.int64], ...]


def sequences(checkpoint: Path, text: Path | None, bos: int | None) -> Sequences:
    """The tokens of a .txt or .jsonl file (an object with `text` a line), or of the built-in text, in sequences.

    Each begins with `bos` where there is one. Raises UsageError on a file without text, or with too little.
    """
    if not (checkpoint / TOKENIZER).is_file():
        raise UsageError(
            f"{checkpoint} has no {TOKENIZER}, and text cannot be read without it",
            hint="copy it from the model's repository",
        )
    name = text.name if text else "the built-in text"
    tokenizer = Tokenizer(checkpoint)
    start = [] if bos is None else [bos]
    found: list[NDArray[np.int64]] = []
    total = 0
    for document in _documents(text):
        tokens = tokenizer.encode(document)
        tokens = tokens[1:] if tokens[:1] == tuple(start) and start else tokens
        step = SEQUENCE - len(start)
        for first in range(0, len(tokens), step):
            piece = [*start, *tokens[first : first + step]][: MOST - total]
            found.append(np.asarray(piece, dtype=np.int64))
            total += len(piece)
            if total >= MOST:
                return tuple(found)
    if total < LEAST:
        raise UsageError(f"{name} has {total} tokens; at least {LEAST} are needed", hint="give a longer text")
    return tuple(found)


def evaluation_text() -> Path:
    """The built-in text to judge on."""
    return Path(str(resources.files("nemotrt.exporter.quantization.texts").joinpath(EVALUATION)))


def _documents(path: Path | None) -> Iterator[str]:
    if path is None:
        yield (
            resources.files("nemotrt.exporter.quantization.texts")
            .joinpath(BUILT_IN)
            .read_text(encoding="utf-8")
        )
        return
    try:
        whole = path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise UsageError(f"{path} is not text in UTF-8: {error.reason}") from error
    if path.suffix != ".jsonl":
        yield whole
        return
    for number, line in enumerate(whole.splitlines(), start=1):
        if line.strip():
            yield _text(path, number, line)


def _text(path: Path, number: int, line: str) -> str:
    try:
        entry = json.loads(line)
    except ValueError as error:
        raise UsageError(f"{path}, line {number}, is not valid JSON: {error}") from error
    if not isinstance(entry, dict) or not isinstance(entry.get("text"), str):
        raise UsageError(f"{path}, line {number}, has no text", hint='a line is {"text": "…"}')
    return str(entry["text"])
