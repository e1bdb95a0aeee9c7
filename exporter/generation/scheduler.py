"""Continuous batching: which tokens of which requests form the next step, and in which slots and pages.

A request is admitted once a sequence slot and the pages for its prompt and all its new tokens (its block table) are
free, so that an admitted request never waits; docs/adr/0010 says what that costs. When a request ends, the next one
gets its slot and pages, so a step mixes chunks of prompts with sequences that decode. Slot 0 and page 0 are scratch.

Legend: T tokens in a step, B sequences in a step, M pages of one sequence.
"""

from collections import deque
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import numpy as np

from nemotrt.exporter.errors import UsageError
from nemotrt.exporter.runtime.manifest import Profile
from nemotrt.exporter.runtime.step import StepInputs, pages_of


@dataclass(frozen=True)
class Request:
    """A prompt's tokens, and how many tokens may follow; `number` is the caller's name for the request."""

    number: int
    prompt: tuple[int, ...]
    max_new_tokens: int


@dataclass
class _Sequence:
    """An admitted request: its slot, its pages, its tokens so far, and how many of them its state holds."""

    slot: int
    pages: list[int]
    tokens: list[int]
    num_computed: int = 0


class Scheduler:
    """Turns a queue of requests into steps. The caller runs each step and returns the sampled tokens."""

    def __init__(self, profile: Profile, *, num_slots: int, num_pages: int) -> None:
        """`profile` limits a step, with a page size of 0 for a model without a KV cache; scratch rows are counted."""
        self._profile = profile
        self._queue: deque[Request] = deque()
        self._running: dict[int, _Sequence] = {}
        self._counts: dict[int, int] = {}
        """The current step: how many tokens of each request are in it."""
        self._num_pages = num_pages
        # Taken from the end: the lowest first, and later the row that was freed last.
        self._free_slots = list(range(num_slots - 1, 0, -1))
        self._free_pages = list(range(num_pages - 1, 0, -1))

    def submit(self, request: Request) -> None:
        """Queue a request; raises UsageError if it could never run."""
        total = len(request.prompt) + request.max_new_tokens
        if not request.prompt or request.max_new_tokens < 1:
            raise UsageError(
                f"request {request.number} has {len(request.prompt)} tokens and asks for"
                f" {request.max_new_tokens} more; both must be at least 1"
            )
        if total > self._profile.max_context:
            raise UsageError(
                f"request {request.number} needs room for {total} tokens, a sequence has"
                f" {self._profile.max_context}",
                hint="shorten the prompt, ask for fewer tokens, or build with a larger --max-context",
            )
        if self._pages_needed(request) > self._num_pages - 1:
            raise UsageError(
                f"request {request.number} needs {self._pages_needed(request)} pages, the session has"
                f" {self._num_pages - 1}"
            )
        self._queue.append(request)

    @property
    def is_done(self) -> bool:
        """Whether every request has ended."""
        return not self._queue and not self._running

    def next_step(self) -> tuple[StepInputs, tuple[int, ...]]:
        """The inputs of the next step, and the request of each row of logits; `complete` must follow."""
        self._admit()
        budget, self._counts = self._profile.max_tokens, {}
        # Oldest first, so that sequences that decode come before prompts that were admitted later.
        for number, sequence in self._running.items():
            if count := min(len(sequence.tokens) - sequence.num_computed, budget):
                self._counts[number] = count
                budget -= count
        assert self._counts, "a running sequence always has a token to compute"
        return self._inputs()

    def complete(self, tokens: Mapping[int, int], ended: Iterable[int] = ()) -> None:
        """Record the step's outcome: the next token of each request with a row of logits, and the requests that end."""
        for number, count in self._counts.items():
            self._running[number].num_computed += count
        for number, token in tokens.items():
            self._running[number].tokens.append(token)
        for number in ended:
            sequence = self._running.pop(number)
            self._free_slots.append(sequence.slot)
            self._free_pages += reversed(sequence.pages)

    def _pages_needed(self, request: Request) -> int:
        # The state of the last new token is never computed.
        return pages_of(len(request.prompt) + request.max_new_tokens - 1, self._profile.page_size)

    def _admit(self) -> None:
        """Give requests their slots and pages, in order of arrival, until one does not fit."""
        while self._queue and self._free_slots and len(self._running) < self._profile.max_sequences:
            needed = self._pages_needed(self._queue[0])
            if needed > len(self._free_pages):
                return
            request = self._queue.popleft()
            pages = [self._free_pages.pop() for _ in range(needed)]
            self._running[request.number] = _Sequence(self._free_slots.pop(), pages, list(request.prompt))

    def _inputs(self) -> tuple[StepInputs, tuple[int, ...]]:
        sequences = [self._running[number] for number in self._counts]
        start = np.asarray([sequence.num_computed for sequence in sequences], dtype=np.int32)
        query_start = np.cumsum([0, *self._counts.values()], dtype=np.int32)
        end = start + np.diff(query_start)
        tokens = [s.tokens[a:b] for s, a, b in zip(sequences, start, end, strict=True)]
        pages = [
            s.pages[: pages_of(b, self._profile.page_size)]
            for s, b in zip(sequences, end.tolist(), strict=True)
        ]
        table_BM = np.zeros((len(sequences), max(1, *map(len, pages))), dtype=np.int32)
        for row, used in zip(table_BM, pages, strict=True):
            row[: len(used)] = used
        # Only the last known token of a sequence is followed by a new one.
        is_last = end == [len(sequence.tokens) for sequence in sequences]
        inputs = StepInputs(
            input_ids=np.concatenate(tokens, dtype=np.int64),
            query_start=query_start,
            context_len=start,
            slot=np.asarray([sequence.slot for sequence in sequences], dtype=np.int32),
            page_table=table_BM,
            logits_row=query_start[1:][is_last] - 1,
        )
        return inputs, tuple(np.asarray(list(self._counts))[is_last].tolist())
