"""Whether a fault changes any output: a clamp that never acts is no fault of this model."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from nemotrt.exporter.checkpoint.loaded_model import LoadedModel
from nemotrt.exporter.config import BuildConfig
from nemotrt.exporter.runtime.graph_file import OnnxGraph
from nemotrt.exporter.runtime.step import StepInputs, pages_of
from nemotrt.exporter.validation import metrics
from nemotrt.exporter.validation.candidates import graph_candidate
from nemotrt.exporter.validation.comparison import observe
from nemotrt.exporter.validation.envelope import Envelope, SequenceChunk, packed_step
from nemotrt.exporter.validation.observation import Observation
from nemotrt.exporter.validation.plan import workload_of
from nemotrt.exporter.validation.runners.base import Mode


class Effects:
    """The outputs of a correct graph over all steps that a fault can need to show, and a faulty graph's change."""

    def __init__(self, model: LoadedModel, config: BuildConfig, correct: Path) -> None:
        envelope, workload = Envelope.of(config), workload_of(model, config, 0)
        self._sizes = envelope.sizes
        self._noise = workload.noise(model.pools(config), self._sizes)
        self._runs: tuple[tuple[StepInputs, ...], ...] = (
            *workload.scenarios(workload.random_tokens(workload.decode)).values(),
            envelope.steps(workload.vocab_size, 0),
            _every_token(workload.vocab_size, envelope),
        )
        self._correct = self._observed(correct)

    def largest(self, graph: Path) -> float:
        """The largest relative L2 by which an output changes; 0 if all are equal bit for bit."""
        return max(map(_change, self._observed(graph), self._correct))

    def _observed(self, graph: Path) -> list[Observation]:
        runner = graph_candidate(OnnxGraph.read(graph)).open(self._sizes, Mode.BOUND)
        return [observe(runner, steps, self._noise) for steps in self._runs]


def _every_token(vocab_size: int, envelope: Envelope) -> tuple[StepInputs, ...]:
    """Each token of the vocabulary, in prompts of one fresh sequence."""
    length = min(envelope.max_tokens, envelope.max_context)
    pages = range(1, 1 + pages_of(length, envelope.page_size))
    tokens = np.arange(vocab_size, dtype=np.int64)
    return tuple(
        packed_step([SequenceChunk(tokens[first : first + length], 0, 1, pages)])
        for first in range(0, vocab_size, length)
    )


def _change(faulty: Observation, correct: Observation) -> float:
    pairs = [(faulty.logits_RV, correct.logits_RV)]
    pairs += [(faulty.pools[name], values) for name, values in correct.pools.items()]
    changes = [_distance(*pair) for pair in pairs if not np.array_equal(*pair, equal_nan=True)]
    strays = faulty.out_of_bounds != correct.out_of_bounds
    return max(changes, default=float("inf") if strays else 0.0)


def _distance(faulty: np.ndarray, correct: np.ndarray) -> float:
    distance = metrics.relative_l2(*metrics.in_fp64(faulty, correct))
    return distance if np.isfinite(distance) else float("inf")
