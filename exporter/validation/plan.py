"""What a validation runs, known before it starts: the tuples that it iterates are also what its progress bar counts.

Legend: B sequences.
"""

import dataclasses
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray

from nemotrt.exporter.checkpoint.loaded_model import LoadedModel
from nemotrt.exporter.config import BUILD_DRIFT_STEPS, BuildConfig
from nemotrt.exporter.runtime.step import StepInputs, pages_of
from nemotrt.exporter.validation import envelope as envelopes
from nemotrt.exporter.validation.envelope import EMPTY, Envelope, PoolSizes, SequenceChunk, packed_step
from nemotrt.exporter.validation.layer_forms import first_of_each_form
from nemotrt.exporter.validation.observation import Noise
from nemotrt.plugins.contract import EMBEDDINGS, HEAD, DType, PoolSpec

PREFILL, CHUNKED, DECODE, MIXED = "prefill", "chunked prefill", "decode", "mixed batch"
"""The names of the scenarios; a mixed batch has fresh, continued, decoding and empty sequences, and padding."""

CHUNKS = (1, 17, 64)
"""Uneven chunks of a prompt; the rest of it is the last chunk."""

NUM_SLOTS = 5
"""Slots that the scenarios use, scratch included; only the envelope has more."""

Scenarios = dict[str, tuple[StepInputs, ...]]
"""Named steps, run in order on pools that hold noise at first: a fresh sequence must not read them."""

NUM_PROMPT, NUM_DECODE = 96, 64
"""Tokens of the prompt, and tokens decoded after it."""

NUM_MODES = 2
"""A candidate runs the scenarios in two modes, whose results must be bitwise equal."""

NUM_LEVELS = 9
"""Values of the noise in a pool: quarters from −1 to 1, exact in every dtype."""

SEQUENCES = 2
"""Sequences of the long decode."""

WINDOW = 30
"""Steps before each mark of the long decode whose logits are compared."""


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
            # Two and three tokens do not fill the window of a convolution.
            packed_step([first.next(1), EMPTY, third.next(2), second.next(3)], padding=1),
        ),
    }


@dataclass(frozen=True)
class Workload:
    """The tokens of the scenarios: how many, and the seed of the prompt and of the pools' initial noise."""

    prompt: int
    decode: int
    seed: int
    vocab_size: int
    page_size: int
    envelope: Envelope | None = None
    """The limits that a scenario reaches; None if the whole model's pools do not fit the memory."""

    @property
    def sizes(self) -> PoolSizes:
        """The pools of every scenario but the envelope."""
        pages = pages_of(self.prompt + self.decode, self.page_size)
        return PoolSizes(NUM_SLOTS, 1 + (NUM_SLOTS - 1) * pages)

    def sizes_of(self, scenario: str) -> PoolSizes:
        """The pools of a scenario."""
        return self.envelope.sizes if self.envelope and scenario == envelopes.SCENARIO else self.sizes

    @property
    def num_steps(self) -> int:
        """Steps of all scenarios."""
        return sum(map(len, self.scenarios(np.zeros(self.decode, dtype=np.int64)).values()))

    def noises(self, pools: Sequence[PoolSpec]) -> dict[PoolSizes, Noise]:
        """The initial contents of the pools of every scenario, by their sizes."""
        all_sizes = dict.fromkeys((self.sizes, self.sizes_of(envelopes.SCENARIO)))
        return {sizes: self.noise(pools, sizes) for sizes in all_sizes}

    def random_tokens(self, count: int) -> NDArray[np.int64]:
        """Tokens drawn uniformly from the vocabulary; the first ones are the prompt."""
        return np.random.default_rng(self.seed).integers(0, self.vocab_size, count, dtype=np.int64)

    def scenarios(self, continuation: NDArray[np.int64]) -> Scenarios:
        """The scenarios, with these tokens decoded after the prompt."""
        short = scenarios(self.random_tokens(self.prompt), continuation, self.page_size)
        if not self.envelope:
            return short
        # One long prompt reaches no further limit, and is the slowest step in PyTorch: layers run it alone.
        return short | {envelopes.SCENARIO: self.envelope.steps(self.vocab_size, self.seed)[:2]}

    def noise(self, pools: Iterable[PoolSpec], sizes: PoolSizes | None = None) -> Noise:
        """The initial contents of pools, as another sequence may have left them; exposes reads of a stale slot.

        The values are exact in every dtype, so that all runners start from the same bits. They come from the bit
        generator itself, whose stream NumPy promises to keep: every machine derives the same values from the seed.
        `sizes` are those of the scenarios, unless given.
        """
        bits = np.random.PCG64(self.seed)
        noise: Noise = {}
        for pool in pools:
            shape = pool.shape(*(sizes or self.sizes))
            count = int(np.prod(shape))
            levels = bits.random_raw(-(-count // 8)).astype("<u8").view(np.uint8)[:count] % NUM_LEVELS
            around_zero = levels.view(np.int8) - np.int8(NUM_LEVELS // 2)
            noise[pool.name] = np.divide(around_zero, 4, dtype=np.float32).reshape(shape)
        return noise


@dataclass(frozen=True)
class LongDecode:
    """Random tokens of fresh sequences, decoded one by one, and the marks after which the state is compared."""

    tokens_BT: NDArray[np.int64]
    page_size: int

    @property
    def sizes(self) -> PoolSizes:
        """Pools with the pages of all sequences."""
        return PoolSizes(NUM_SLOTS, 1 + SEQUENCES * pages_of(self.tokens_BT.shape[1], self.page_size))

    @property
    def marks(self) -> tuple[int, ...]:
        """1, 2, 5, 10, 20, 50 … and the number of steps."""
        num_steps = int(self.tokens_BT.shape[1])
        series = (factor * 10**power for power in range(6) for factor in (1, 2, 5))
        return (*(mark for mark in series if mark < num_steps), num_steps)

    @property
    def spans(self) -> tuple[tuple[int, int, int], ...]:
        """Up to each mark: the first step, the first step that needs logits, and the last step (exclusive)."""
        spans = pairwise((0, *self.marks))
        return tuple((first, max(first, last - WINDOW), last) for first, last in spans)

    def step(self, first: int, last: int, watched: int) -> StepInputs:
        """One step with the tokens `first` to `last` (exclusive) of each sequence; those from `watched` need logits."""
        pages = np.arange(1, self.sizes.num_pages).reshape(SEQUENCES, -1)
        chunks = [
            SequenceChunk(tokens[first:last], first, slot, pages[slot - 1])
            for slot, tokens in enumerate(self.tokens_BT, start=1)
        ]
        return packed_step(chunks, first_logits=max(watched - first, 0))


def empty_pools(pools: Iterable[PoolSpec], sizes: PoolSizes) -> Noise:
    """Pools of zeros."""
    return {pool.name: np.zeros(pool.shape(*sizes), dtype=np.float32) for pool in pools}


@dataclass(frozen=True)
class Plan:
    """All that a validation against PyTorch runs; its length is the total of the progress bar."""

    workload: Workload
    dtypes: tuple[DType, ...]
    """PyTorch runs in these: FP32 (the reference), and the graph's compute dtype (the rounding baseline)."""
    drift: LongDecode | None
    parts: tuple[str, ...]
    """The parts of the graph that run alone, by name."""
    envelope: Envelope
    """The limits that the first layers of each form reach, each alone."""

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
    with_envelope: bool = True,
) -> Plan:
    """What a validation of this model runs; `drift_steps` is limited by the longest sequence, and may be 0.

    Without `with_envelope`, only single layers reach the limits of the profile, and not the whole model.
    """
    dtypes = tuple(dict.fromkeys((DType.FLOAT32, config.dtype)))
    drift = None
    num_steps = min(drift_steps, config.max_context)
    if num_steps and "mamba" in model.config.layers:
        generator = np.random.default_rng([seed, num_steps])
        tokens_BT = generator.integers(0, model.config.vocab_size, (SEQUENCES, num_steps), dtype=np.int64)
        drift = LongDecode(tokens_BT, config.page_size)
    parts = parts_of(model) if with_parts else ()
    envelope = Envelope.of(config)
    workload = dataclasses.replace(
        workload_of(model, config, seed), envelope=envelope if with_envelope else None
    )
    return Plan(workload, dtypes, drift, parts, envelope)


def workload_of(model: LoadedModel, config: BuildConfig, seed: int) -> Workload:
    """The tokens of the scenarios for this model, without the envelope."""
    return Workload(NUM_PROMPT, NUM_DECODE, seed, model.config.vocab_size, config.page_size)


def envelope_parts(model: LoadedModel) -> tuple[str, ...]:
    """The parts that run at the limits of the profile: the embeddings, the first layer of each form, the head."""
    return (EMBEDDINGS, *(f"layers.{index}" for index in first_of_each_form(model.config).values()), HEAD)


def parts_of(model: LoadedModel) -> tuple[str, ...]:
    """The parts of a model's graph: the embeddings, each layer, and the head."""
    return (EMBEDDINGS, *(f"layers.{index}" for index in model.config.numbered_layers), HEAD)
