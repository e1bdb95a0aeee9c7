"""The gates: every number that a validation holds against a limit.

FP32 is held to 1e-4. A lower precision is held to three times its *floor*: what PyTorch itself loses at that
precision against PyTorch in FP32, measured on the same tokens.

Legend: R rows of logits, V vocabulary, T tokens, E experts.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from nemotrt.exporter import metrics, routing
from nemotrt.exporter.artifacts import Gate
from nemotrt.exporter.errors import ValidationError
from nemotrt.exporter.routing import RouterLogits

Array = NDArray[np.float64]

FP32_RELATIVE_L2 = 1e-4
FLOOR_FACTOR = 3.0
"""The worst of ten prompt batches was 2.45 times the median of the floor, so three."""

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


def layer_gates(place: str, shown: dict[str, Pair], floor: dict[str, Pair] | None) -> list[Gate]:
    """The gates of one part that ran alone: of each value that it gave, beside the reference's on the same inputs."""
    return [
        gate
        for name, pair in shown.items()
        for gate in _output(ALONE, f"{place} {name}".strip(), pair, floor[name] if floor else None)
    ]


def gates(
    scenario: str, candidate: Compared, floor: Compared | None, noise: dict[str, NDArray[np.float32]]
) -> list[Gate]:
    """Every gate of one scenario: finiteness, logits, next token, routers, and every pool without its scratch row.

    `floor` is PyTorch at the candidate's precision; `noise` what the pools held at first. Raises ValidationError
    when an output that should be compared is missing.
    """
    seen, expected = candidate.seen, candidate.expected
    missing = sorted(set(expected.pools) - set(seen.pools))
    if missing or seen.logits_RV.shape != expected.logits_RV.shape:
        raise ValidationError(
            f"{scenario}: {missing[0] if missing else 'logits'} was not produced by the graph"
        )
    found = _output(scenario, "logits", _of_logits(candidate), _of_logits(floor) if floor else None)
    for name in expected.pools:
        found.append(_stray_writes(scenario, name, candidate, noise[name]))
        base = _of_pool(floor, name, noise[name]) if floor else None
        found += _output(scenario, name, _of_pool(candidate, name, noise[name]), base)
    found += _routers(scenario, candidate, floor)
    if np.isfinite(seen.logits_RV).all():
        found += _next_token(scenario, _of_logits(candidate), _of_logits(floor) if floor else None)
    return found


def _of_logits(compared: Compared) -> Pair:
    return compared.seen.logits_RV, compared.expected.logits_RV


def _of_pool(compared: Compared, name: str, noise: NDArray[np.float32]) -> Pair:
    """Only what the reference wrote, so that noise cannot dilute an error."""
    seen, expected = compared.seen.pools[name][1:], compared.expected.pools[name][1:]
    written = written_of(name, expected, noise[1:])
    return seen[written], expected[written]


def _stray_writes(scenario: str, name: str, candidate: Compared, noise: NDArray[np.float32]) -> Gate:
    """What the reference did not write must be as it was, to the bit."""
    written = written_of(name, candidate.expected.pools[name][1:], noise[1:])
    stray = np.count_nonzero(candidate.seen.pools[name][1:][~written] != noise[1:][~written])
    return Gate(scenario, name, "stray writes", float(stray), 0.0)


def _output(scenario: str, name: str, candidate: Pair, floor: Pair | None) -> list[Gate]:
    """Finiteness, and then the distances."""
    broken = np.count_nonzero(~np.isfinite(candidate[0]))
    found = [Gate(scenario, name, "not finite", float(broken), 0.0)]
    if floor and not np.isfinite(floor[0]).all():
        # An infinite floor is a limit that everything passes.
        lost = np.count_nonzero(~np.isfinite(floor[0]))
        found.append(Gate(scenario, name, "floor not finite", float(lost), 0.0))
    elif not broken:
        found += _distances(scenario, name, candidate, floor)
    return found


def _routers(scenario: str, candidate: Compared, floor: Compared | None) -> list[Gate]:
    """How far the scores by which experts are chosen are off, at worst: what excuses another choice, and no more."""
    if not any(candidate.seen.routers):
        return []
    gates = []
    off = _score_errors(candidate)
    base = _score_errors(floor) if floor else [None] * len(off)
    for layer, (error, floor_error) in enumerate(zip(off, base, strict=True)):
        limit = FP32_RELATIVE_L2 if floor_error is None else FLOOR_FACTOR * floor_error
        gates.append(Gate(scenario, f"router {layer}", "score error", error, limit, floor_error))
    return gates


def _score_errors(compared: Compared) -> list[float]:
    """The largest difference of any token's score of any expert, for each MoE layer."""
    pairs = zip(routing.joined(compared.seen.routers), routing.joined(compared.expected.routers), strict=True)
    return [float(np.abs(routing.scores(a) - routing.scores(b)).max(initial=0.0)) for a, b in pairs]


def written_of(name: str, pool: Array, noise: NDArray[np.float32]) -> NDArray[np.bool_]:
    """Which of a pool's values a step wrote: whole slots, and whole positions of pages.

    Not value by value: among the hundred millions of a large model's state, some equal their noise by chance.
    """
    within = (1, 2, 4) if name.startswith("kv_cache.") else tuple(range(1, pool.ndim))
    changed = (pool != noise).any(axis=within, keepdims=True)
    return np.broadcast_to(changed, pool.shape)


def _distances(scenario: str, name: str, candidate: Pair, base: Pair | None) -> list[Gate]:
    """Relative L2, and at a lower precision the norm ratio too, each against its limit."""
    error = metrics.relative_l2(*candidate)
    if base is None:
        return [Gate(scenario, name, "relative L2", error, FP32_RELATIVE_L2)]
    ratio, angle = metrics.norm_ratio_error(*candidate), 1 - metrics.cosine(*candidate)
    floor, floor_ratio = metrics.relative_l2(*base), metrics.norm_ratio_error(*base)
    floor_angle = 1 - metrics.cosine(*base)
    return [
        Gate(scenario, name, "relative L2", error, FLOOR_FACTOR * floor, floor),
        # A norm can come out right by luck: its error is never larger than the relative L2 of the same values.
        Gate(scenario, name, "norm ratio", ratio, FLOOR_FACTOR * max(floor_ratio, floor), floor_ratio),
        # Edge-LLM's thresholds suit trained models. Where PyTorch itself misses them at this precision (a router that
        # is near a tie, as with random weights), its own loss is the measure.
        Gate(scenario, name, "1 − cosine", angle, max(1 - COSINE, FLOOR_FACTOR * floor_angle), floor_angle),
        Gate(
            scenario,
            name,
            "norm ratio, absolute",
            ratio,
            max(NORM_RATIO, FLOOR_FACTOR * floor_ratio),
            floor_ratio,
        ),
    ]


def _next_token(scenario: str, candidate: Pair, base: Pair | None) -> list[Gate]:
    """KL of the next-token distributions, and how clearly the reference prefers a token that was not chosen."""
    kl = metrics.kl_divergence(*candidate)
    flipped = metrics.flips(*candidate).max(initial=0.0)
    if base is None:
        scale = float(np.abs(candidate[1]).max())
        return [Gate(scenario, "logits", "greedy flip's margin", float(flipped), FP32_RELATIVE_L2 * scale)]
    floor_kl = metrics.kl_divergence(*base)
    floor_flipped = metrics.flips(*base).max(initial=0.0)
    # Where the floor flips nothing, a flip may still stand between two tokens closer than the floor's own error.
    margin = max(float(floor_flipped), float(np.abs(base[0] - base[1]).max()))
    return [
        Gate(
            scenario,
            "logits",
            "mean KL",
            float(kl.mean()),
            FLOOR_FACTOR * float(floor_kl.mean()),
            float(floor_kl.mean()),
        ),
        Gate(
            scenario,
            "logits",
            "max KL",
            float(kl.max()),
            FLOOR_FACTOR * float(floor_kl.max()),
            float(floor_kl.max()),
        ),
        Gate(scenario, "logits", "greedy flip's margin", float(flipped), 2 * margin, float(floor_flipped)),
    ]


def same_bits(scenario: str, metric: str, bound: Observation, unbound: Observation) -> Gate:
    """One way against the other, as pools updated in place against pools fed and fetched: not a bit may differ."""
    differing = [
        name
        for name in bound.pools
        if not np.array_equal(bound.pools[name][1:], unbound.pools[name][1:], equal_nan=True)
    ]
    if not np.array_equal(bound.logits_RV, unbound.logits_RV, equal_nan=True):
        differing.append("logits")
    return Gate(scenario, differing[0] if differing else "all", metric, float(len(differing)), 0.0)
