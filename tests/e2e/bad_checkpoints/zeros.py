"""Checkpoints with zeros where trained weights have none: stopped downloads, holes, and rows that were never set."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import torch

from bad_checkpoints.damage import SINGLE, Case, replaced, sharded, tokenizer

WITH_TOKENS = {"hybrid_override_pattern": "-", "vocab_size": 1024}
"""A vocabulary in which the example's tokenizer has a token for each row."""


def zero_rows(start: int, stop: int) -> Callable[[torch.Tensor], torch.Tensor]:
    """The tensor with these rows zero, and every second one negative."""

    def change(tensor: torch.Tensor) -> torch.Tensor:
        tensor = tensor.clone()
        tensor[start:stop] = 0.0
        tensor[start:stop:2] = -0.0
        return tensor

    return change


def emptied(name: str, keep: float) -> Callable[[Path], None]:
    """A file of which a part arrived, and the rest is a hole: it has its full size."""

    def damage(folder: Path) -> None:
        size = (folder / name).stat().st_size
        header = 8 + int.from_bytes((folder / name).read_bytes()[:8], "little")
        os.truncate(folder / name, header + int(keep * (size - header)))
        os.truncate(folder / name, size)

    return damage


ZEROS = {
    "download-that-stopped": Case(
        r"is zero in .* \(model\.safetensors\); \d+ more tensors have zero rows: .* …", emptied(SINGLE, 0.5)
    ),
    "download-that-stopped-at-the-end": Case(
        r'lm_head\.weight is zero in rows \d+ to 1023 of 1024, the first of token "',
        tokenizer(emptied(SINGLE, 0.99)),
        model=WITH_TOKENS,
    ),
    "shard-that-is-a-hole": Case(
        r"is zero in all \d+ rows \(shard-2\.safetensors\)",
        sharded(lambda folder, _: emptied("shard-2.safetensors", 0)(folder)),
    ),
    "matrix-that-is-zero": Case(
        r"in_proj\.weight is zero in all 132 rows", replaced("in_proj.weight", torch.zeros_like)
    ),
    "expert-that-is-zero": Case(
        r"experts\.2\.up_proj\.weight is zero in all 24 rows",
        replaced("experts.2.up_proj.weight", torch.zeros_like),
    ),
    "eighth-of-a-matrix-zero": Case(
        r"q_proj\.weight is zero in rows 5 to 8 of 32", replaced("q_proj.weight", zero_rows(5, 9))
    ),
    "last-row-of-the-embeddings-zero": Case(
        r'embeddings\.weight is zero in row 1023 of 1024, the row of token ".+"',
        tokenizer(replaced("embeddings.weight", zero_rows(1023, 1024))),
        model=WITH_TOKENS,
    ),
    "first-rows-of-the-embeddings-zero": Case(
        r'embeddings\.weight is zero in rows 1 to 15 of 1024, the first of token "',
        tokenizer(replaced("embeddings.weight", zero_rows(0, 16))),
        model=WITH_TOKENS,
    ),
    "row-of-the-head-zero": Case(
        r'lm_head\.weight is zero in row 7 of 1024, the row of token "',
        tokenizer(replaced("lm_head.weight", zero_rows(7, 8))),
        model=WITH_TOKENS,
    ),
    "row-of-tied-embeddings-zero": Case(
        r'embeddings\.weight is zero in row 7 of 1024, the row of token "',
        tokenizer(replaced("embeddings.weight", zero_rows(7, 8))),
        model=WITH_TOKENS | {"tie_word_embeddings": True},
    ),
}
