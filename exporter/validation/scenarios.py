"""The scenarios: steps that every runner executes, with identical tokens, carried state, and every kind of batch."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from nemotrt.exporter.runtime.step import StepInputs, pages_of

PREFILL, CHUNKED, DECODE, MIXED = "prefill", "chunked prefill", "decode", "mixed batch"
"""The names of the scenarios; a mixed batch has fresh, continued, decoding and empty sequences, and padding."""

CHUNKS = (1, 17, 64)
"""Uneven chunks of a prompt; the rest of it is the last chunk."""

NUM_SLOTS = 5
"""Slots that the scenarios use, scratch included."""

Scenarios = dict[str, tuple[StepInputs, ...]]
"""Named steps, run in order on pools that hold noise at first: a fresh sequence must not read them."""


class SequenceChunk(NamedTuple):
    """The next tokens of one sequence in a step; no tokens for an empty place of a padded batch."""

    tokens: NDArray[np.int64]
    context_len: int
    slot: int
    pages: Sequence[int]


EMPTY = SequenceChunk(np.zeros(0, dtype=np.int64), 0, 0, ())


def packed_step(chunks: Sequence[SequenceChunk], *, padding: int = 0, first_logits: int = 0) -> StepInputs:
    """One step with these chunks, packed; logits are wanted of each chunk's tokens from `first_logits` on."""
    starts = np.cumsum([0, *(len(chunk.tokens) for chunk in chunks)])
    pages = np.zeros((len(chunks), max(len(chunk.pages) for chunk in chunks)), dtype=np.int32)
    for row, chunk in zip(pages, chunks, strict=True):
        row[: len(chunk.pages)] = chunk.pages
    rows = [np.arange(start + first_logits, end) for start, end in pairwise(starts)]
    return StepInputs(
        input_ids=np.concatenate([*(chunk.tokens for chunk in chunks), np.zeros(padding, dtype=np.int64)]),
        query_start=starts.astype(np.int32),
        context_len=np.asarray([chunk.context_len for chunk in chunks], dtype=np.int32),
        slot=np.asarray([chunk.slot for chunk in chunks], dtype=np.int32),
        page_table=pages,
        logits_row=np.concatenate(rows).astype(np.int32),
    )


class _Sequence:
    """A sequence in a slot, which gives its tokens chunk by chunk."""

    def __init__(self, slot: int, tokens: NDArray[np.int64], page_size: int) -> None:
        self._slot, self._tokens, self._position = slot, tokens, 0
        # Pages are scattered and out of order, so that the page table matters.
        pages = reversed(range(pages_of(len(tokens), page_size)))
        self._pages = [slot + i * (NUM_SLOTS - 1) for i in pages]

    def next(self, count: int) -> SequenceChunk:
        """The next `count` tokens."""
        first = self._position
        self._position += count
        return SequenceChunk(self._tokens[first : self._position], first, self._slot, self._pages)


def scenarios(prompt: NDArray[np.int64], continuation: NDArray[np.int64], page_size: int) -> Scenarios:
    """Prefill at once, chunked prefill, prefill and decode, and a mixed batch with an empty sequence and padding.

    `prompt` must have more tokens than the chunks; `continuation` is decoded token by token.
    """
    tokens = np.concatenate([prompt, continuation])
    whole, chunked, decoding = (_Sequence(slot, tokens, page_size) for slot in (2, 1, 3))
    chunks = (*CHUNKS, len(prompt) - sum(CHUNKS))
    first = _Sequence(4, tokens, page_size)
    second = _Sequence(1, tokens[::-1].copy(), page_size)
    third = _Sequence(2, np.roll(tokens, 7), page_size)
    return {
        PREFILL: (packed_step([whole.next(len(prompt))]),),
        CHUNKED: tuple(packed_step([chunked.next(count)]) for count in chunks),
        DECODE: (
            packed_step([decoding.next(len(prompt))]),
            *(packed_step([decoding.next(1)]) for _ in continuation),
        ),
        MIXED: (
            packed_step([first.next(len(prompt)), second.next(5)], padding=3),
            packed_step([third.next(33), first.next(1), EMPTY, second.next(21)], padding=2),
            packed_step([first.next(1), EMPTY, third.next(1), second.next(1)], padding=1),
        ),
    }
