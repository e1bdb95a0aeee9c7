"""Steps that reach every limit of a bundle's profile, so that a validation drives all that the bundle promises.

A sequence starts deep: the initial contents of the pools serve as its history, so that no thousands of steps have to
fill them. Legend: T tokens in a step, B sequences in a step, M pages of one sequence.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from enum import StrEnum
from itertools import cycle, pairwise
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from nemotrt.exporter.config import BuildConfig
from nemotrt.exporter.engines.shape_profiles import COMPARED_ROWS
from nemotrt.exporter.report.model import EnvelopeLimit, Gate, Metric
from nemotrt.exporter.runtime.manifest import Profile
from nemotrt.exporter.runtime.step import StepInputs, pages_of

SCENARIO, LIMITS = "envelope", "limits of the profile"
"""The scenario's name, and that under which the report states how far it went."""

LENGTHS = (1, 63, 64, 65, 0, 127, 128, 129, 2)
"""Tokens of the sequences of a mixture: next to the sizes of the ops' chunks, and an empty sequence."""

DEEP = (511, 512, 513, 2047, 2048, 2049)
"""Context lengths next to powers of two, at which a kernel may change its loop."""


class SequenceChunk(NamedTuple):
    """The next tokens of one sequence in a step; no tokens for an empty place of a padded batch."""

    tokens: NDArray[np.int64]
    context_len: int
    slot: int
    pages: Sequence[int]


EMPTY = SequenceChunk(np.zeros(0, dtype=np.int64), 0, 0, ())


def packed_step(chunks: Sequence[SequenceChunk], *, padding: int = 0, first_logits: int = 0) -> StepInputs:
    """One step with these chunks, packed; each chunk's tokens need logits from `first_logits` on."""
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


class Limit(StrEnum):
    """What a profile limits; the value is its name in reports."""

    TOKENS = "tokens in a step"
    SEQUENCES = "sequences in a step"
    CONTEXT = "tokens of a sequence"
    SLOT = "highest slot"
    PAGE = "highest page"


class PoolSizes(NamedTuple):
    """Rows of the pools, scratch included."""

    num_slots: int
    num_pages: int


@dataclass(frozen=True)
class Envelope:
    """The largest steps and pools that a bundle promises."""

    max_tokens: int
    max_sequences: int
    max_context: int
    page_size: int

    @classmethod
    def of(cls, limits: BuildConfig | Profile) -> Envelope:
        """The envelope of a bundle that is built with this configuration, or that has this profile."""
        return cls(limits.max_tokens, limits.max_sequences, limits.max_context, limits.page_size)

    @property
    def pages_per_sequence(self) -> int:
        """Pages of a sequence of the maximum length."""
        return pages_of(self.max_context, self.page_size)

    @property
    def sizes(self) -> PoolSizes:
        """The pools of as many sequences as possible, each of the maximum length."""
        return PoolSizes(1 + self.max_sequences, 1 + self.max_sequences * self.pages_per_sequence)

    @property
    def promised(self) -> dict[Limit, int]:
        """Each limit."""
        slots, pages = self.sizes
        sizes = (self.max_tokens, self.max_sequences, self.max_context, slots - 1, pages - 1)
        return dict(zip(Limit, sizes, strict=True))

    def steps(self, vocab_size: int, seed: int) -> tuple[StepInputs, ...]:
        """A mixture of as many tokens and sequences as possible, a decode step at deep contexts, and one long prompt.

        The first sequence of the mixture ends at the maximum length, in the highest page of the pool; pages, slots and
        rows of logits are permuted. Each step has the last token of the vocabulary, and the first if it has two.
        """
        generator = np.random.default_rng([seed, self.max_tokens, self.max_context])
        slots, pages = self.sizes
        slot_B = 1 + generator.permutation(slots - 1)
        page_BM = (1 + generator.permutation(pages - 1)).reshape(self.max_sequences, self.pages_per_sequence)
        # The deepest sequence ends in the highest page.
        last, highest = page_BM[0, -1], pages - 1
        page_BM[page_BM == highest], page_BM[0, -1] = last, highest

        def step(lengths: Sequence[int], contexts: Sequence[int], num_tokens: int) -> StepInputs:
            chunks = []
            for b, (length, context) in enumerate(zip(lengths, contexts, strict=True)):
                tokens = generator.integers(0, vocab_size, length, dtype=np.int64)
                used = page_BM[b, : pages_of(context + length, self.page_size)].tolist()
                chunks.append(SequenceChunk(tokens, context, int(slot_B[b]), used))
            inputs = packed_step(chunks, padding=num_tokens - sum(lengths))
            inputs.input_ids[sum(lengths) - 1], inputs.input_ids[0] = 0, vocab_size - 1
            return dataclasses.replace(inputs, logits_row=generator.permutation(_spread_rows(inputs)))

        lengths = self._mixture()
        prompt = min(self.max_tokens, self.max_context)
        ones = [1] * self.max_sequences
        return (
            step(lengths, self._contexts(lengths), self.max_tokens),
            step(ones, self._contexts(ones), self.max_sequences),
            step([prompt], [0], prompt),
        )

    def _mixture(self) -> list[int]:
        """Tokens of each sequence: LENGTHS in turn, and the rest of the step's tokens in the last sequences."""
        rest, lengths = self.max_tokens, []
        for length, later in zip(cycle(LENGTHS), reversed(range(self.max_sequences)), strict=False):
            lengths.append(max(0, min(length, self.max_context, rest - later)))
            rest -= lengths[-1]
        for b in reversed(range(self.max_sequences)):
            more = min(rest, self.max_context - lengths[b])
            lengths[b] += more
            rest -= more
        return lengths

    def _contexts(self, lengths: Sequence[int]) -> list[int]:
        """Context lengths: the longest, then those next to the ends of pages, powers of two, and 0."""
        page = self.page_size
        deep = (self.max_context, 0, page - 1, page, page + 1, *DEEP, self.max_context - page)
        return [
            max(0, min(context, self.max_context - length))
            for length, context in zip(lengths, cycle(deep), strict=False)
        ]


def _spread_rows(inputs: StepInputs) -> NDArray[np.int32]:
    """The last token of each sequence, and tokens spread over the step: as many as an engine returns."""
    start_B, end_B = inputs.query_start[:-1], inputs.query_start[1:]
    last_N = end_B[end_B > start_B] - 1
    num_tokens = int(inputs.query_start[-1])
    spread = np.linspace(0, num_tokens - 1, max(0, min(COMPARED_ROWS, num_tokens) - len(last_N)))
    return np.unique(np.concatenate([spread.astype(np.int32), last_N])).astype(np.int32)


def driven(
    envelope: Envelope, whole: Iterable[StepInputs], alone: Iterable[StepInputs] = ()
) -> tuple[EnvelopeLimit, ...]:
    """Each limit, and how far steps of the whole model and of single layers reached."""
    sides = [reached(steps, envelope.page_size) for steps in (whole, alone)]
    return tuple(
        EnvelopeLimit(limit, value, *(side[limit] for side in sides))
        for limit, value in envelope.promised.items()
    )


def gates(limits: Iterable[EnvelopeLimit]) -> list[Gate]:
    """For each limit, by how much the validation stayed below it."""
    return [
        Gate(LIMITS, limit.name, Metric.NOT_REACHED, float(max(0, limit.promised - limit.driven)), 0.0)
        for limit in limits
    ]


def reached(steps: Iterable[StepInputs], page_size: int) -> dict[Limit, int]:
    """How far these steps go in each limit: only sequences with tokens count, and only pages that hold some."""
    sizes = dict.fromkeys(Limit, 0)
    for inputs in steps:
        length_B = np.diff(inputs.query_start)
        is_live_B = length_B > 0
        end_B = (inputs.context_len + length_B)[is_live_B]
        used_BM = np.arange(inputs.page_table.shape[1]) < -(-end_B // page_size)[:, None]
        values = (
            len(inputs.input_ids),
            len(length_B),
            end_B.max(initial=0),
            inputs.slot[is_live_B].max(initial=0),
            inputs.page_table[is_live_B][used_BM].max(initial=0),
        )
        sizes = {limit: max(sizes[limit], int(value)) for limit, value in zip(Limit, values, strict=True)}
    return sizes
