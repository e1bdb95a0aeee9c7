"""Samples the next token from a row of logits: greedy, or with temperature, top-k and top-p.

Each request has its own random generator and draws one number for each token, so its samples do not depend on the
other requests in the batch. (Its logits may differ in the last bits, since sums are computed in another order.)

Legend: V vocabulary.
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from nemotrt.exporter.errors import UsageError


@dataclass(frozen=True)
class SamplingConfig:
    """How tokens are sampled; raises UsageError on values that are out of range or have no effect."""

    temperature: float = 0.0
    """0 is greedy: always the token with the largest logit."""
    top_p: float = 1.0
    """Sample from the smallest set of tokens whose probabilities reach this sum; 1 keeps all tokens."""
    top_k: int = 0
    """Sample from the k most likely tokens; 0 keeps all tokens."""
    seed: int = 0

    def __post_init__(self) -> None:
        if not (self.temperature >= 0 and np.isfinite(self.temperature)):
            raise UsageError(f"--temperature {self.temperature} is not a finite number of at least 0")
        if not 0 < self.top_p <= 1:
            raise UsageError(f"--top-p {self.top_p} is not above 0 and at most 1")
        if self.top_k < 0:
            raise UsageError(f"--top-k {self.top_k} is below 0", hint="0 keeps all tokens")
        if self.seed < 0:
            raise UsageError(f"--seed {self.seed} is below 0")
        if self.temperature == 0 and (self.top_p < 1 or self.top_k > 0 or self.seed > 0):
            raise UsageError(
                "--top-p, --top-k and --seed have no effect at temperature 0, which always takes the most likely token",
                hint="add --temperature 1",
            )


class Sampler:
    """Samples the tokens of one request; `request` distinguishes requests with the same seed."""

    def __init__(self, config: SamplingConfig, request: int) -> None:
        self._config = config
        self._generator = np.random.default_rng((config.seed, request))

    def choose(self, logits_V: NDArray[np.float32]) -> int:
        """The next token; between equal logits, the one with the lower id."""
        if self._config.temperature == 0:
            return int(logits_V.argmax())
        tokens, cumulative = candidates(logits_V, self._config)
        drawn = self._generator.random() * cumulative[-1]
        # Rounding can make the product equal to the sum itself.
        chosen = min(int(np.searchsorted(cumulative, drawn, side="right")), len(tokens) - 1)
        return int(tokens[chosen])


def candidates(
    logits_V: NDArray[np.float32], config: SamplingConfig
) -> tuple[NDArray[np.int64], NDArray[np.float64]]:
    """The tokens to sample from, most likely first, and their cumulative probabilities.

    Applies temperature, then top-k, then top-p, as transformers' generate does. The temperature must be above 0.
    """
    tokens = np.argsort(-logits_V, kind="stable")
    if config.top_k:
        tokens = tokens[: config.top_k]
    scaled = logits_V[tokens].astype(np.float64) / config.temperature
    weights = np.exp(scaled - scaled[0])
    cumulative = np.cumsum(weights / weights.sum())
    if config.top_p < 1:
        count = int(np.searchsorted(cumulative, config.top_p, side="left")) + 1
        tokens, cumulative = tokens[:count], cumulative[:count]
    return tokens, cumulative
