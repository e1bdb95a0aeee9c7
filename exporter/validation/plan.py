"""What a validation runs, known before it starts: the tuples that it iterates are also what its progress bar counts.

Legend: B sequences.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from nemotrt.exporter.checkpoint.loaded_model import LoadedModel
from nemotrt.exporter.config import BUILD_DRIFT_STEPS, BuildConfig
from nemotrt.exporter.runtime.step import StepInputs, pages_of
from nemotrt.exporter.validation.gates import Noise
from nemotrt.exporter.validation.scenarios import (
    NUM_SLOTS,
    Scenarios,
    SequenceChunk,
    packed_step,
    scenarios,
)
from nemotrt.plugins.contract import EMBEDDINGS, HEAD, DType, PoolSpec

PROMPT, DECODE = 96, 64
"""Tokens of the prompt, and tokens decoded after it."""

NUM_MODES = 2
"""A candidate runs the scenarios in two modes, whose results must be bitwise equal."""

NUM_LEVELS = 9
"""Values of the noise in a pool: quarters from −1 to 1, exact in every dtype."""

SEQUENCES = 2
"""Sequences of the long decode."""

WINDOW = 30
"""Steps before each mark of the long decode whose logits are compared."""


@dataclass(frozen=True)
class Workload:
    """The tokens of the scenarios: how many, and the seed of the prompt and of the pools' initial noise."""

    prompt: int
    decode: int
    seed: int
    vocab_size: int
    page_size: int

    @property
    def num_pages(self) -> int:
        """Pages of the pools, scratch included."""
        return 1 + (NUM_SLOTS - 1) * pages_of(self.prompt + self.decode, self.page_size)

    @property
    def num_steps(self) -> int:
        """Steps of all scenarios."""
        return sum(map(len, self.scenarios(np.zeros(self.decode, dtype=np.int64)).values()))

    def random_tokens(self, count: int) -> NDArray[np.int64]:
        """Tokens drawn uniformly from the vocabulary; the first ones are the prompt."""
        return np.random.default_rng(self.seed).integers(0, self.vocab_size, count, dtype=np.int64)

    def scenarios(self, continuation: NDArray[np.int64]) -> Scenarios:
        """The scenarios, with these tokens decoded after the prompt."""
        return scenarios(self.random_tokens(self.prompt), continuation, self.page_size)

    def noise(self, pools: Iterable[PoolSpec]) -> Noise:
        """The initial contents of pools, as another sequence may have left them; exposes reads of a stale slot.

        The values are exact in every dtype, so that all runners start from the same bits. They come from the bit
        generator itself, whose stream NumPy promises to keep: every machine derives the same values from the seed.
        """
        bits = np.random.PCG64(self.seed)
        noise: Noise = {}
        for pool in pools:
            shape = pool.shape(NUM_SLOTS, self.num_pages)
            count = int(np.prod(shape))
            levels = bits.random_raw(-(-count // 8)).astype("<u8").view(np.uint8)[:count] % NUM_LEVELS
            noise[pool.name] = ((levels.astype(np.float32) - NUM_LEVELS // 2) / np.float32(4)).reshape(shape)
        return noise


class Span(NamedTuple):
    """Steps `first` to `last` (exclusive) of a long decode, up to one mark; those from `watched` on want logits."""

    first: int
    watched: int
    last: int


@dataclass(frozen=True)
class LongDecode:
    """Random tokens of fresh sequences, decoded one by one, and the marks after which the state is compared."""

    tokens_BT: NDArray[np.int64]
    page_size: int

    @property
    def num_pages(self) -> int:
        """Pages of all sequences, scratch included."""
        return 1 + SEQUENCES * pages_of(self.tokens_BT.shape[1], self.page_size)

    @property
    def marks(self) -> tuple[int, ...]:
        """1, 2, 5, 10, 20, 50 … and the number of steps."""
        num_steps = int(self.tokens_BT.shape[1])
        series = (factor * 10**power for power in range(6) for factor in (1, 2, 5))
        return (*(mark for mark in series if mark < num_steps), num_steps)

    @property
    def spans(self) -> tuple[Span, ...]:
        """The steps between the marks."""
        firsts = (0, *self.marks[:-1])
        return tuple(
            Span(first, max(first, last - WINDOW), last)
            for first, last in zip(firsts, self.marks, strict=True)
        )

    def step(self, first: int, last: int, watched: int) -> StepInputs:
        """One step with the tokens `first` to `last` (exclusive) of each sequence; those from `watched` want logits."""
        pages = np.arange(1, self.num_pages).reshape(SEQUENCES, -1)
        chunks = [
            SequenceChunk(tokens[first:last], first, slot, pages[slot - 1])
            for slot, tokens in enumerate(self.tokens_BT, start=1)
        ]
        return packed_step(chunks, first_logits=max(watched - first, 0))


def empty_pools(pools: Iterable[PoolSpec], num_slots: int, num_pages: int) -> Noise:
    """Pools of zeros."""
    return {pool.name: np.zeros(pool.shape(num_slots, num_pages), dtype=np.float32) for pool in pools}


@dataclass(frozen=True)
class Plan:
    """All that a validation against PyTorch runs; its length is the total of the progress bar."""

    workload: Workload
    dtypes: tuple[DType, ...]
    """PyTorch runs in these: FP32 (the reference), and the graph's compute dtype (the rounding baseline)."""
    drift: LongDecode | None
    parts: tuple[str, ...]
    """The parts of the graph that run alone, by name."""

    def __len__(self) -> int:
        runs = (len(self.dtypes) + NUM_MODES) * self.workload.num_steps
        if self.drift:
            runs += self.drift.marks[-1] + len(self.dtypes) * len(self.drift.spans)
        return runs + len(self.parts)


def plan_validation(
    model: LoadedModel,
    config: BuildConfig,
    *,
    seed: int = 0,
    drift_steps: int = BUILD_DRIFT_STEPS,
    with_parts: bool = True,
) -> Plan:
    """What a validation of this model runs; `drift_steps` is limited by the longest sequence, and may be 0."""
    dtypes = tuple(dict.fromkeys((DType.FLOAT32, config.dtype)))
    drift = None
    num_steps = min(drift_steps, config.max_context)
    if num_steps and "mamba" in model.config.layers:
        generator = np.random.default_rng([seed, num_steps])
        tokens_BT = generator.integers(0, model.config.vocab_size, (SEQUENCES, num_steps), dtype=np.int64)
        drift = LongDecode(tokens_BT, config.page_size)
    parts = parts_of(model) if with_parts else ()
    return Plan(workload_of(model, config, seed), dtypes, drift, parts)


def workload_of(model: LoadedModel, config: BuildConfig, seed: int) -> Workload:
    """The scenarios' tokens for this model."""
    return Workload(PROMPT, DECODE, seed, model.config.vocab_size, config.page_size)


def parts_of(model: LoadedModel) -> tuple[str, ...]:
    """The parts of a model's graph: the embeddings, each layer, and the head."""
    return (EMBEDDINGS, *(f"layers.{index}" for index in model.config.numbered_layers), HEAD)
