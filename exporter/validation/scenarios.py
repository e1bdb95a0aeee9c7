"""The steps that a validation drives through every runner: identical tokens, carried state, every kind of batch."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from nemotrt.exporter.runtime.step import StepInputs

MIXED = "mixed batch"
"""The scenario of every kind of sequence at once: fresh, carried on, decoding, empty, and padding."""

PIECES = (1, 17, 64)
"""Uneven pieces of a prompt; what is left is the last piece."""


@dataclass(frozen=True)
class Scenario:
    """Named steps, run in order on pools that start as noise: a fresh sequence must not read them."""

    name: str
    steps: tuple[StepInputs, ...]


@dataclass
class _Sequence:
    slot: int
    pages: list[int]
    tokens: NDArray[np.int64]
    done: int = 0


@dataclass
class _Plan:
    """Packs pieces of sequences into steps."""

    page_size: int
    max_pages: int
    steps: list[StepInputs] = field(default_factory=list)

    def step(self, pieces: list[tuple[_Sequence | None, int]], *, padding: int = 0) -> None:
        """One step with `n` further tokens of each sequence; None stands for an empty place of a padded batch."""
        tokens, starts, contexts, slots, tables = [], [0], [], [], []
        for sequence, count in pieces:
            table = [0] * self.max_pages
            if sequence is not None:
                tokens.append(sequence.tokens[sequence.done : sequence.done + count])
                table[: len(sequence.pages)] = sequence.pages
            starts.append(starts[-1] + count)
            contexts.append(sequence.done if sequence is not None else 0)
            slots.append(sequence.slot if sequence is not None else 0)
            tables.append(table)
            if sequence is not None:
                sequence.done += count
        tokens.append(np.zeros(padding, dtype=np.int64))
        self.steps.append(
            StepInputs(
                input_ids=np.concatenate(tokens),
                query_start=np.asarray(starts, dtype=np.int32),
                context_len=np.asarray(contexts, dtype=np.int32),
                slot=np.asarray(slots, dtype=np.int32),
                page_table=np.asarray(tables, dtype=np.int32),
                logits_row=np.arange(starts[-1], dtype=np.int32),
            )
        )


NUM_SLOTS = 5
"""Slots that the scenarios use, scratch included."""


def num_pages(prompt: int, decode: int, page_size: int) -> int:
    """Pages that the scenarios use, scratch included."""
    return 1 + (NUM_SLOTS - 1) * pages_of(prompt + decode, page_size)


def pages_of(tokens: int, page_size: int) -> int:
    """Pages that hold so many tokens."""
    return -(-tokens // page_size)


def scenarios(
    prompt: NDArray[np.int64], continuation: NDArray[np.int64], page_size: int
) -> tuple[Scenario, ...]:
    """Prefill at once, in uneven pieces, then decode; and a mixed batch with an empty and a padded sequence.

    `prompt` must have more tokens than the pieces; `continuation` is decoded token by token, whatever a runner says.
    """
    tokens = np.concatenate([prompt, continuation])
    per_sequence = pages_of(len(tokens), page_size)

    def sequence(slot: int, values: NDArray[np.int64] = tokens) -> _Sequence:
        # Pages are scattered, and not in order, so that the page table matters.
        pages = [1 + (slot - 1) + i * (NUM_SLOTS - 1) for i in reversed(range(per_sequence))]
        return _Sequence(slot, pages, values)

    at_once = _Plan(page_size, per_sequence)
    one = sequence(2)
    at_once.step([(one, len(prompt))])

    decode = _Plan(page_size, per_sequence)
    one = sequence(3)
    decode.step([(one, len(prompt))])
    for _ in continuation:
        decode.step([(one, 1)])

    pieces = _Plan(page_size, per_sequence)
    one = sequence(1)
    for count in (*PIECES, len(prompt) - sum(PIECES)):
        pieces.step([(one, count)])

    mixed = _Plan(page_size, per_sequence)
    first, second, third = sequence(4), sequence(1, tokens[::-1].copy()), sequence(2, np.roll(tokens, 7))
    mixed.step([(first, len(prompt)), (second, 5)], padding=3)
    mixed.step([(third, 33), (first, 1), (None, 0), (second, 21)], padding=2)
    mixed.step([(first, 1), (None, 0), (third, 1), (second, 1)], padding=1)
    plans = {"prefill": at_once, "prefill in pieces": pieces, "decode": decode, MIXED: mixed}
    return tuple(Scenario(name, tuple(plan.steps)) for name, plan in plans.items())
