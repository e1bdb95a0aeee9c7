"""The gates: every number that a validation holds against a limit.

FP32 is held to 1e-4. A lower precision is held to three times its *baseline*: what PyTorch itself loses at that
precision against PyTorch in FP32, measured on the same tokens.

Legend: R rows of logits, V vocabulary, T tokens, E experts.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from nemotrt.exporter.errors import ValidationError
from nemotrt.exporter.report.model import Gate, Metric
from nemotrt.exporter.validation import metrics, routing
from nemotrt.exporter.validation.routing import RouterLogits

Array = NDArray[np.float64]

FP32_RELATIVE_L2 = 1e-4
BASELINE_FACTOR = 3.0
"""The worst of ten prompt batches was 2.45 times the median of the rounding baseline, so three."""

ALONE = "each layer alone"
"""The scenario in which every part runs on inputs that are the same to the bit."""

COSINE, NORM_RATIO = 0.99, 0.25
"""The two gates of TensorRT Edge-LLM, on top."""


@dataclass(frozen=True)
class Observation:
    """What one runner showed in one scenario: logits of every step side by side, and the pools at its end."""

    logits_RV: Array
    pools: dict[str, Array]
    routers: tuple[RouterLogits, ...] = ()
    """A step each, its tokens only; nothing in them where the runner does not show any."""


@dataclass(frozen=True)
class Compared:
    """What a runner showed, and the reference with the experts that the runner chose."""

    seen: Observation
    expected: Observation


Pair = tuple[Array, Array]
"""A runner's values, and the reference's."""

Noise = dict[str, NDArray[np.float32]]
"""What each pool held at first."""


@dataclass(frozen=True)
class Distances:
    """How far one output of a runner is from the reference's; no distance is measured where a side is not finite."""

    not_finite: int
    """Values that are NaN or infinite."""
    reference_not_finite: int = 0
    """Such values of the reference."""
    relative_l2: float = 0.0
    norm_ratio: float = 0.0
    angle: float = 0.0
    """1 − cosine."""


@dataclass(frozen=True)
class TokenDistances:
    """How far a runner's next-token distributions are from the reference's."""

    kl: tuple[float, ...]
    """Nats, a row of logits each."""
    flip_margin: float
    """The most by which the reference prefers its own best token to the runner's, where they differ; in logits."""
    largest: float
    """The largest difference of a logit."""


@dataclass(frozen=True)
class Measured:
    """How far a runner is from the reference in one scenario: every number that a gate judges, or derives from."""

    outputs: dict[str, Distances]
    """Of the logits and of every pool, by name."""
    next_token: TokenDistances | None
    """None where logits are not finite."""
    score_errors: tuple[float, ...]
    """The largest error of a router's score, for each MoE layer; nothing where the runner does not show any."""


def measured(compared: Compared, noise: Noise) -> Measured:
    """How far the runner is from the reference; of pools what the reference wrote, so that noise dilutes no error."""
    logits = compared.seen.logits_RV, compared.expected.logits_RV
    outputs = {"logits": _distances_of(logits)}
    for name in compared.expected.pools:
        outputs[name] = _distances_of(_of_pool(compared, name, noise[name]))
    is_finite = all(np.isfinite(values).all() for values in logits)
    next_token = _next_token_of(logits) if is_finite else None
    return Measured(outputs, next_token, _score_errors(compared))


def layer_gates(place: str, shown: dict[str, Pair], baseline: dict[str, Pair] | None) -> list[Gate]:
    """The gates of one part that ran alone: of each value that it gave, beside the reference's on the same inputs."""
    found = []
    for name, pair in shown.items():
        base = _distances_of(baseline[name]) if baseline else None
        found += _output(ALONE, f"{place} {name}".strip(), _distances_of(pair), base)
    return found


def gates(scenario: str, candidate: Compared, baseline: Measured | None, noise: Noise) -> list[Gate]:
    """Every gate of one scenario: finiteness, logits, next token, routers, and every pool without its scratch row.

    `baseline` is of PyTorch at the candidate's precision. Raises ValidationError when an output that should be compared
    is missing.
    """
    seen, expected = candidate.seen, candidate.expected
    missing = sorted(set(expected.pools) - set(seen.pools))
    if missing or seen.logits_RV.shape != expected.logits_RV.shape:
        raise ValidationError(
            f"{scenario}: {missing[0] if missing else 'logits'} was not produced by the graph"
        )
    found: list[Gate] = []
    own = measured(candidate, noise)
    for name, distances in own.outputs.items():
        if name in noise:
            found.append(_stray_writes(scenario, name, candidate, noise[name]))
        found += _output(scenario, name, distances, baseline.outputs[name] if baseline else None)
    found += _routers(scenario, own, baseline)
    if own.next_token and baseline is None:
        scale = float(np.abs(expected.logits_RV).max())
        flipped = own.next_token.flip_margin
        found.append(Gate(scenario, "logits", Metric.TOP1_MARGIN, flipped, FP32_RELATIVE_L2 * scale))
    elif own.next_token and baseline and baseline.next_token:
        found += _next_token(scenario, own.next_token, baseline.next_token)
    return found


def _of_pool(compared: Compared, name: str, noise: NDArray[np.float32]) -> Pair:
    seen, expected = compared.seen.pools[name][1:], compared.expected.pools[name][1:]
    written = written_of(name, expected, noise[1:])
    return seen[written], expected[written]


def _stray_writes(scenario: str, name: str, candidate: Compared, noise: NDArray[np.float32]) -> Gate:
    """What the reference did not write must be as it was, to the bit."""
    written = written_of(name, candidate.expected.pools[name][1:], noise[1:])
    stray = np.count_nonzero(candidate.seen.pools[name][1:][~written] != noise[1:][~written])
    return Gate(scenario, name, Metric.OUT_OF_BOUNDS, float(stray), 0.0)


def _output(scenario: str, name: str, own: Distances, baseline: Distances | None) -> list[Gate]:
    """Finiteness, and then the distances."""
    found = [Gate(scenario, name, Metric.NOT_FINITE, float(own.not_finite), 0.0)]
    if own.reference_not_finite:
        lost = float(own.reference_not_finite)
        found.append(Gate(scenario, name, Metric.REFERENCE_NOT_FINITE, lost, 0.0))
    elif baseline and baseline.not_finite:
        # An infinite baseline is a limit that everything passes.
        found.append(Gate(scenario, name, Metric.BASELINE_NOT_FINITE, float(baseline.not_finite), 0.0))
    elif not own.not_finite:
        found += _distances(scenario, name, own, baseline)
    return found


def score_limits(baseline: Measured | None, num_layers: int) -> list[float]:
    """How far off a router's score may be, for each of the MoE layers."""
    if baseline is None:
        return [FP32_RELATIVE_L2] * num_layers
    return [BASELINE_FACTOR * error for error in baseline.score_errors]


def _routers(scenario: str, own: Measured, baseline: Measured | None) -> list[Gate]:
    """How far the scores by which experts are chosen are off, at worst: what excuses another choice, and no more."""
    if not own.score_errors:
        return []
    limits = score_limits(baseline, len(own.score_errors))
    bases: Sequence[float | None] = baseline.score_errors if baseline else [None] * len(limits)
    return [
        Gate(scenario, f"router {layer}", Metric.ROUTER_SCORE, error, limit, base)
        for layer, (error, limit, base) in enumerate(zip(own.score_errors, limits, bases, strict=True))
    ]


def _score_errors(compared: Compared) -> tuple[float, ...]:
    """The largest difference of any token's score of any expert, for each MoE layer."""
    if not any(compared.seen.routers):
        return ()
    pairs = zip(routing.joined(compared.seen.routers), routing.joined(compared.expected.routers), strict=True)
    return tuple(float(np.abs(routing.scores(a) - routing.scores(b)).max(initial=0.0)) for a, b in pairs)


def written_of(name: str, pool: Array, noise: NDArray[np.float32]) -> NDArray[np.bool_]:
    """Which of a pool's values a step wrote: whole slots, and whole positions of pages.

    Not value by value: among the hundred millions of a large model's state, some equal their noise by chance.
    """
    within = (1, 2, 4) if name.startswith("kv_cache.") else tuple(range(1, pool.ndim))
    changed = (pool != noise).any(axis=within, keepdims=True)
    return np.broadcast_to(changed, pool.shape)


def _distances_of(pair: Pair) -> Distances:
    own, reference = (int(np.count_nonzero(~np.isfinite(values))) for values in pair)
    if own or reference:
        return Distances(own, reference)
    return Distances(
        0, 0, metrics.relative_l2(*pair), metrics.norm_ratio_error(*pair), 1 - metrics.cosine(*pair)
    )


def _distances(scenario: str, name: str, own: Distances, baseline: Distances | None) -> list[Gate]:
    """Relative L2, and at a lower precision the norm ratio too, each against its limit."""
    if baseline is None:
        return [Gate(scenario, name, Metric.RELATIVE_L2, own.relative_l2, FP32_RELATIVE_L2)]
    # A norm can come out right by luck: its error is never larger than the relative L2 of the same values.
    norm_limit = BASELINE_FACTOR * max(baseline.norm_ratio, baseline.relative_l2)
    # Edge-LLM's thresholds suit trained models. Where PyTorch itself misses them at this precision (a router that
    # is near a tie, as with random weights), its own loss is the measure.
    angle_limit = max(1 - COSINE, BASELINE_FACTOR * baseline.angle)
    absolute_limit = max(NORM_RATIO, BASELINE_FACTOR * baseline.norm_ratio)
    return [
        Gate(
            scenario,
            name,
            Metric.RELATIVE_L2,
            own.relative_l2,
            BASELINE_FACTOR * baseline.relative_l2,
            baseline.relative_l2,
        ),
        Gate(scenario, name, Metric.NORM_RATIO, own.norm_ratio, norm_limit, baseline.norm_ratio),
        Gate(scenario, name, Metric.COSINE, own.angle, angle_limit, baseline.angle),
        Gate(scenario, name, Metric.NORM_RATIO_ABSOLUTE, own.norm_ratio, absolute_limit, baseline.norm_ratio),
    ]


def _next_token_of(logits: Pair) -> TokenDistances:
    kl = metrics.kl_divergence(*logits)
    flipped = metrics.flips(*logits).max(initial=0.0)
    return TokenDistances(tuple(kl.tolist()), float(flipped), float(np.abs(logits[0] - logits[1]).max()))


def _next_token(scenario: str, own: TokenDistances, baseline: TokenDistances) -> list[Gate]:
    """KL of the next-token distributions, and how clearly the reference prefers a token that was not chosen."""
    mean, baseline_mean = float(np.mean(own.kl)), float(np.mean(baseline.kl))
    # Where the baseline flips nothing, a flip may still stand between two tokens closer than the baseline's own error.
    margin = max(baseline.flip_margin, baseline.largest)
    return [
        Gate(scenario, "logits", Metric.MEAN_KL, mean, BASELINE_FACTOR * baseline_mean, baseline_mean),
        Gate(
            scenario,
            "logits",
            Metric.MAX_KL,
            max(own.kl),
            BASELINE_FACTOR * max(baseline.kl),
            max(baseline.kl),
        ),
        Gate(scenario, "logits", Metric.TOP1_MARGIN, own.flip_margin, 2 * margin, baseline.flip_margin),
    ]


def same_bits(scenario: str, bound: Observation, unbound: Observation) -> Gate:
    """One way against the other, as pools updated in place against pools fed and fetched: not a bit may differ."""
    differing = [
        name
        for name in bound.pools
        if not np.array_equal(bound.pools[name][1:], unbound.pools[name][1:], equal_nan=True)
    ]
    if not np.array_equal(bound.logits_RV, unbound.logits_RV, equal_nan=True):
        differing.append("logits")
    where = differing[0] if differing else "all"
    return Gate(scenario, where, Metric.MODES_DIFFER, float(len(differing)), 0.0)
