"""The next token from one row of logits: greedy, or drawn by temperature, top-k and top-p.

A request draws from its own generator, one number a token, so that what it draws does not depend on which
other requests run beside it. (Its logits may, in the last bits: sums are taken in another order.)
Legend: V vocabulary.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from nemotrt.exporter.errors import UsageError


@dataclass(frozen=True)
class SamplingConfig:
    """How tokens are chosen; raises UsageError on numbers that mean nothing or have no effect."""

    temperature: float = 0.0
    """0 is greedy: the token with the largest logit."""
    top_p: float = 1.0
    """The smallest set of tokens whose probabilities sum to this; 1 takes all."""
    top_k: int = 0
    """The k likeliest tokens; 0 takes all."""
    seed: int = 0

    def __post_init__(self) -> None:
        if not (self.temperature >= 0 and np.isfinite(self.temperature)):
            raise UsageError(f"--temperature {self.temperature} is no number from 0 up")
        if not 0 < self.top_p <= 1:
            raise UsageError(f"--top-p {self.top_p} is not above 0 and at most 1")
        if self.top_k < 0:
            raise UsageError(f"--top-k {self.top_k} is below 0", hint="0 takes all tokens")
        if self.seed < 0:
            raise UsageError(f"--seed {self.seed} is below 0")
        if self.temperature == 0 and (self.top_p < 1 or self.top_k > 0 or self.seed > 0):
            raise UsageError(
                "--top-p, --top-k and --seed have no effect at temperature 0: it takes the likeliest token",
                hint="add --temperature 1",
            )


class Sampler:
    """The tokens of one request: `request` is its number among those that share a seed."""

    def __init__(self, config: SamplingConfig, request: int) -> None:
        self._config = config
        self._generator = np.random.default_rng((config.seed, request))

    def choose(self, logits_V: NDArray[np.float32]) -> int:
        """The next token; of equal logits the lower id counts as the larger."""
        if self._config.temperature == 0:
            return int(logits_V.argmax())
        tokens, cumulative = candidates(logits_V, self._config)
        drawn = self._generator.random() * cumulative[-1]
        # Rounding can bring the product up to the sum itself.
        chosen = min(int(np.searchsorted(cumulative, drawn, side="right")), len(tokens) - 1)
        return int(tokens[chosen])


def candidates(
    logits_V: NDArray[np.float32], config: SamplingConfig
) -> tuple[NDArray[np.int64], NDArray[np.float64]]:
    """The tokens that may be drawn, likeliest first, and their running sum of probability.

    Temperature first, then top-k, then top-p of what top-k left (the order of transformers' generate). The
    temperature must be above 0.
    """
    tokens = np.argsort(-logits_V, kind="stable")
    if config.top_k:
        tokens = tokens[: config.top_k]
    scaled = logits_V[tokens].astype(np.float64) / config.temperature
    weights = np.exp(scaled - scaled[0])
    cumulative = np.cumsum(weights / weights.sum())
    if config.top_p < 1:
        kept = int(np.searchsorted(cumulative, config.top_p, side="left")) + 1
        tokens, cumulative = tokens[:kept], cumulative[:kept]
    return tokens, cumulative
