"""Read text for calibration and evaluation as sequences of tokens."""

from collections.abc import Iterator
from importlib import resources
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from nemotrt.exporter.errors import UsageError
from nemotrt.exporter.generation.tokenizer import TOKENIZER, Tokenizer
from nemotrt.exporter.runtime.strict_json import parse_object

BUILT_IN, EVALUATION = "calibration.txt", "evaluation.txt"
"""The package's own texts, written for this project; nothing is calibrated on the second."""

SEQUENCE_TOKENS = 512
"""Maximum tokens of a sequence; longer texts are split."""
MIN_TOKENS = 256
"""Minimum tokens in all; ranges and perplexities of fewer mean nothing."""
MAX_TOKENS = 16_384
"""Maximum tokens in all; the rest of the text is not used, and the user is told."""

JSON_LINES = (".jsonl", ".ndjson", ".json")
"""Suffixes of files with `{"text": …}` on each line, in upper or lower case; all other files are plain text."""

Sequences = tuple[NDArray[np.int64], ...]


def sequences(checkpoint: Path, text: Path | None, bos: int | None) -> Sequences:
    """The tokens of a text file or a JSON_LINES file, or of the built-in text, in sequences.

    Each sequence begins with `bos`, if given. Raises UsageError on a file without text or with too little.
    """
    if not (checkpoint / TOKENIZER).is_file():
        raise UsageError(
            f"{checkpoint} has no {TOKENIZER}, which is needed to read text",
            hint="copy it from the model's repository",
        )
    tokenizer = Tokenizer(checkpoint)
    start = [] if bos is None else [bos]
    result: list[NDArray[np.int64]] = []
    total = 0
    for document in _documents(text):
        tokens = tokenizer.encode(document)
        if start and tokens[:1] == tuple(start):
            tokens = tokens[1:]
        step = SEQUENCE_TOKENS - len(start)
        for first in range(0, len(tokens), step):
            sequence = [*start, *tokens[first : first + step]][: MAX_TOKENS - total]
            result.append(np.asarray(sequence, dtype=np.int64))
            total += len(sequence)
            if total >= MAX_TOKENS:
                return tuple(result)
    if total < MIN_TOKENS:
        name = text.name if text else "the built-in text"
        raise UsageError(
            f"{name} has {total} tokens; at least {MIN_TOKENS} are needed", hint="use a longer text"
        )
    return tuple(result)


def built_in(name: str) -> Path:
    """One of the package's texts."""
    return Path(str(resources.files("nemotrt.exporter.quantization.texts").joinpath(name)))


def _documents(path: Path | None) -> Iterator[str]:
    path = path or built_in(BUILT_IN)
    try:
        content = path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise UsageError(f"{path} is not UTF-8 text: {error.reason}") from error
    if path.suffix.lower() not in JSON_LINES:
        yield content
        return
    # Not splitlines(), which also ends a line at characters that a JSON string may hold, such as U+2028.
    for number, line in enumerate(content.split("\n"), start=1):
        if line.strip():
            document = parse_object(line, f"{path}, line {number},", UsageError).get("text")
            if not isinstance(document, str):
                raise UsageError(f"{path}, line {number}, has no text", hint='a line is {"text": "…"}')
            yield document
