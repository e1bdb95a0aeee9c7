"""Continuous batching: which tokens of which requests make the next step, in which slots and pages.

A request that ends gives its slot and pages to the next one in the queue at once, so a step mixes prompts (in
pieces) with sequences that decode. Pages are handed out as tokens need them, and only where every running
request can still end: this is the banker's algorithm (Dijkstra, EWD 623) for one kind of resource, so
that a request may wait for pages but never for ever. Slot 0 and page 0 are scratch and never handed out.
Legend: T tokens in a step, B sequences in a step, M pages of one sequence.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

import numpy as np

from nemotrt.exporter.errors import UsageError
from nemotrt.exporter.runtime.step import StepInputs, pages_of


@dataclass(frozen=True)
class Limits:
    """What a step and the pools hold; `page_size` 0 in a model without a KV cache."""

    max_tokens: int
    max_sequences: int
    max_context: int
    page_size: int
    num_slots: int
    num_pages: int


@dataclass(frozen=True)
class Request:
    """A prompt's tokens and how many tokens may follow it; `number` is the caller's name for it."""

    number: int
    prompt: tuple[int, ...]
    max_new_tokens: int


@dataclass(frozen=True)
class PlannedStep:
    """A step's inputs, and the requests that its rows of logits are for, in order."""

    inputs: StepInputs
    wanting: tuple[int, ...]
    counts: dict[int, int]
    """A request's number → how many of its tokens the step takes."""


@dataclass
class _Running:
    """A request with a slot: its tokens so far, and how many of them its state holds."""

    request: Request
    slot: int
    tokens: list[int]
    num_held: int = 0
    pages: list[int] = field(default_factory=list)

    @property
    def num_pending(self) -> int:
        return len(self.tokens) - self.num_held


class Scheduler:
    """Turns a queue of requests into steps; the caller runs them and says which tokens came out."""

    def __init__(self, limits: Limits) -> None:
        self._limits = limits
        self._queue: deque[Request] = deque()
        self._running: dict[int, _Running] = {}
        # Taken from the end: the lowest first, and later the one given back last.
        self._free_slots = list(range(limits.num_slots - 1, 0, -1))
        self._free_pages = list(range(limits.num_pages - 1, 0, -1))

    def submit(self, request: Request) -> None:
        """Queue a request; raises UsageError when it could never run."""
        total = len(request.prompt) + request.max_new_tokens
        if not request.prompt or request.max_new_tokens < 1:
            raise UsageError(
                f"request {request.number} has {len(request.prompt)} tokens and asks for"
                f" {request.max_new_tokens} more; both must be at least 1"
            )
        if total > self._limits.max_context:
            raise UsageError(
                f"request {request.number} needs room for {total} tokens, a sequence has"
                f" {self._limits.max_context}",
                hint="shorten the prompt, ask for fewer tokens, or build with a larger --max-context",
            )
        if self._pages_needed(request) > self._limits.num_pages - 1:
            raise UsageError(
                f"request {request.number} needs {self._pages_needed(request)} pages, the session has"
                f" {self._limits.num_pages - 1}"
            )
        self._queue.append(request)

    @property
    def is_done(self) -> bool:
        """Whether every request has ended."""
        return not self._queue and not self._running

    def next_step(self) -> PlannedStep:
        """The next step, at least one token; call `complete` with its outcome before the next."""
        counts: dict[int, int] = {}
        budget = self._limits.max_tokens
        # The oldest first: who decodes was here before who still reads its prompt.
        for running in self._running.values():
            budget -= self._take(running, budget, counts)
        while budget and self._queue and self._admit():
            running = self._running[self._queue.popleft().number]
            budget -= self._take(running, budget, counts)
        assert counts, "no request can go on, which the banker's rule excludes"
        return self._planned(counts)

    def complete(self, step: PlannedStep, tokens: Mapping[int, int], ended: Iterable[int] = ()) -> None:
        """Take the outcome: the next token of each request in `step.wanting`, and which requests end."""
        for number, count in step.counts.items():
            self._running[number].num_held += count
        for number, token in tokens.items():
            self._running[number].tokens.append(token)
        for number in ended:
            running = self._running.pop(number)
            self._free_slots.append(running.slot)
            self._free_pages += reversed(running.pages)

    def _pages_needed(self, request: Request) -> int:
        # The last new token ends the sequence: nothing computes its state.
        return pages_of(len(request.prompt) + request.max_new_tokens - 1, self._limits.page_size)

    def _admit(self) -> bool:
        """Give the queue's first request a slot if one is free and its first token has a page."""
        if not self._free_slots or len(self._running) == self._limits.max_sequences:
            return False
        request = self._queue[0]
        running = _Running(request, self._free_slots[-1], list(request.prompt))
        self._running[request.number] = running
        if not self._grant(running, 1):
            del self._running[request.number]
            return False
        self._free_slots.pop()
        return True

    def _take(self, running: _Running, budget: int, counts: dict[int, int]) -> int:
        """How many of a sequence's tokens go into the step: as many as the budget and its pages hold."""
        count = self._grant(running, min(running.num_pending, budget))
        if count:
            counts[running.request.number] = count
        return count

    def _grant(self, running: _Running, wanted: int) -> int:
        """How many more tokens its pages hold, up to `wanted`, given what pages are safe to give."""
        if not self._limits.page_size:
            return wanted
        needed = pages_of(running.num_held + wanted, self._limits.page_size)
        while len(running.pages) < needed and self._is_safe_to_give(running):
            running.pages.append(self._free_pages.pop())
        return min(wanted, len(running.pages) * self._limits.page_size - running.num_held)

    def _is_safe_to_give(self, receiver: _Running) -> bool:
        """Whether all running requests can still end, in some order, when the receiver gets one page more."""
        if not self._free_pages:
            return False
        free = len(self._free_pages) - 1
        held = {number: len(running.pages) for number, running in self._running.items()}
        held[receiver.request.number] += 1
        missing = {
            number: self._pages_needed(running.request) - held[number]
            for number, running in self._running.items()
        }
        # Whoever misses least ends first, and what it held is free for the next.
        for number in sorted(missing, key=missing.__getitem__):
            if missing[number] > free:
                return False
            free += held[number]
        return True

    def _planned(self, counts: dict[int, int]) -> PlannedStep:
        running = [self._running[number] for number in counts]
        pieces = [
            one.tokens[one.num_held : one.num_held + count]
            for one, count in zip(running, counts.values(), strict=True)
        ]
        query_start = np.cumsum([0, *counts.values()], dtype=np.int32)
        table_BM = np.zeros((len(running), max(1, *(len(one.pages) for one in running))), dtype=np.int32)
        for row, one in zip(table_BM, running, strict=True):
            row[: len(one.pages)] = one.pages
        # Only a sequence whose last known token is in this step has a next one.
        is_last = [one.num_pending == count for one, count in zip(running, counts.values(), strict=True)]
        inputs = StepInputs(
            input_ids=np.concatenate(pieces, dtype=np.int64),
            query_start=query_start,
            context_len=np.asarray([one.num_held for one in running], dtype=np.int32),
            slot=np.asarray([one.slot for one in running], dtype=np.int32),
            page_table=table_BM,
            logits_row=query_start[1:][is_last] - 1,
        )
        wanting = tuple(one.request.number for one, last in zip(running, is_last, strict=True) if last)
        return PlannedStep(inputs, wanting, counts)
