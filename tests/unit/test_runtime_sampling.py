"""Tokens are drawn from the distribution that the options say, and from a request's own numbers alone."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from nemotrt.exporter.errors import UsageError
from nemotrt.exporter.generation.sampling import Sampler, SamplingConfig, candidates

# Few distinct values, so that ties are common.
LOGITS = hnp.arrays(np.float32, st.integers(1, 30), elements=st.integers(-6, 6).map(float))


def softmax(logits_V: np.ndarray, temperature: float) -> np.ndarray:
    scaled = logits_V.astype(np.float64) / temperature
    weights = np.exp(scaled - scaled.max())
    return weights / weights.sum()


@given(LOGITS)
def test_greedy_takes_the_largest_and_of_equals_the_first(logits_V: np.ndarray) -> None:
    token = Sampler(SamplingConfig(), 0).choose(logits_V)
    assert logits_V[token] == logits_V.max()
    assert (logits_V[:token] < logits_V[token]).all()


@given(LOGITS, st.floats(0.1, 5), st.integers(0, 40), st.floats(0.01, 1))
def test_candidates_are_the_likeliest_and_no_more_than_needed(
    logits_V: np.ndarray, temperature: float, top_k: int, top_p: float
) -> None:
    config = SamplingConfig(temperature=temperature, top_k=top_k, top_p=top_p)
    tokens, cumulative = candidates(logits_V, config)
    assert 1 <= len(tokens) <= (top_k or len(logits_V))
    assert len(set(tokens.tolist())) == len(tokens)
    left_out = np.delete(logits_V, tokens)
    assert left_out.size == 0 or left_out.max() <= logits_V[tokens].min()
    # Top-p counts within what top-k left: without the last candidate the sum would fall short.
    among = np.sort(logits_V)[::-1][: top_k or None]
    running = np.cumsum(softmax(among, temperature))
    np.testing.assert_allclose(cumulative, running[: len(tokens)], atol=1e-12)
    if top_p < 1:
        assert len(tokens) == 1 or running[len(tokens) - 2] < top_p + 1e-12
        assert running[len(tokens) - 1] >= top_p - 1e-12


@given(LOGITS, st.integers(0, 2**32), st.integers(0, 5))
def test_a_seed_and_a_request_fix_every_token(logits_V: np.ndarray, seed: int, request: int) -> None:
    config = SamplingConfig(temperature=1.0, seed=seed)
    one, other = Sampler(config, request), Sampler(config, request)
    assert [one.choose(logits_V) for _ in range(5)] == [other.choose(logits_V) for _ in range(5)]


def test_other_requests_between_draws_change_nothing() -> None:
    config, logits_V = SamplingConfig(temperature=1.0, seed=3), np.zeros(1000, np.float32)
    alone = Sampler(config, 1)
    expected = [alone.choose(logits_V) for _ in range(10)]
    among = [Sampler(config, number) for number in range(3)]
    drawn = [[sampler.choose(logits_V) for sampler in among] for _ in range(10)]
    assert [row[1] for row in drawn] == expected
    assert [row[0] for row in drawn] != expected
    other = Sampler(SamplingConfig(temperature=1.0, seed=4), 1)
    assert [other.choose(logits_V) for _ in range(10)] != expected


def test_frequencies_are_the_probabilities() -> None:
    logits_V = np.asarray([2.0, 0.0, 1.0, -1.0, 1.0], np.float32)
    sampler = Sampler(SamplingConfig(temperature=0.7, seed=1), 0)
    draws = 20_000
    seen = np.bincount([sampler.choose(logits_V) for _ in range(draws)], minlength=5) / draws
    # Four standard deviations of a share of 20 000 draws, at most 0.0142.
    np.testing.assert_allclose(seen, softmax(logits_V, 0.7), atol=0.0142)


def test_a_low_temperature_is_greedy_in_the_limit() -> None:
    logits_V = np.asarray([1.0, 1.5, 1.25], np.float32)
    sampler = Sampler(SamplingConfig(temperature=1e-6, seed=1), 0)
    assert {sampler.choose(logits_V) for _ in range(20)} == {1}


def test_minus_infinity_is_never_drawn() -> None:
    logits_V = np.asarray([-np.inf, 0.0, -np.inf, 0.0], np.float32)
    sampler = Sampler(SamplingConfig(temperature=1.0, seed=1), 0)
    assert {sampler.choose(logits_V) for _ in range(50)} == {1, 3}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"temperature": -1.0}, "temperature -1"),
        ({"temperature": float("nan")}, "temperature nan"),
        ({"temperature": float("inf")}, "temperature inf"),
        ({"temperature": 1.0, "top_p": 0.0}, "top-p 0"),
        ({"temperature": 1.0, "top_p": 1.1}, "top-p 1.1"),
        ({"temperature": 1.0, "top_k": -1}, "top-k -1"),
        ({"temperature": 1.0, "seed": -1}, "seed -1"),
        ({"top_p": 0.5}, "no effect at temperature 0"),
        ({"top_k": 5}, "no effect at temperature 0"),
        ({"seed": 5}, "no effect at temperature 0"),
    ],
)
def test_options_that_mean_nothing_are_refused(options: dict[str, float], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        SamplingConfig(**options)
