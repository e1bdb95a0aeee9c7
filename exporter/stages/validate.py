"""Validate: the graph against PyTorch on identical tokens and carried state, judged by gates that can fail.

FP32 is held to 1e-4. A lower precision is held to three times its *floor*: what PyTorch itself loses at that
precision against PyTorch in FP32, measured on the same tokens.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from nemotrt.exporter import metrics
from nemotrt.exporter.artifacts import Gate, LoadedModel, ValidationReport
from nemotrt.exporter.config import COMPUTE_DTYPES, BuildConfig
from nemotrt.exporter.errors import ValidationError
from nemotrt.exporter.layer_selection import partial_model
from nemotrt.exporter.runners import Array, CandidateRunner, GraphRunner, Runner, TorchRunner
from nemotrt.exporter.scenarios import NUM_SLOTS, Scenario, num_pages, scenarios
from nemotrt.model.pools import PoolSpec

PROMPT, DECODE = 96, 64
"""Tokens of the prompt, and tokens decoded after it."""

FP32_RELATIVE_L2 = 1e-4
FLOOR_FACTOR = 3.0
"""The worst of ten prompt batches was 2.45 times the median of the floor, so three."""

COSINE, NORM_RATIO = 0.99, 0.25
"""The two gates of TensorRT Edge-LLM, on top."""


@dataclass(frozen=True)
class Observation:
    """What one runner showed in one scenario: logits of every step side by side, and the pools at its end."""

    logits_RV: Array
    pools: dict[str, Array]


def validate(
    model: LoadedModel,
    config: BuildConfig,
    graph: Path,
    *,
    seed: int = 0,
    advance: Callable[[int], None] = lambda _: None,
) -> ValidationReport:
    """The report of every gate on the graph in ONNX Runtime; as `judge`."""
    ways = ("bound", "unbound")

    def open_runner(pages: int, way: str) -> GraphRunner:
        return GraphRunner(graph, num_slots=NUM_SLOTS, num_pages=pages, bound=way == "bound")

    candidate = Candidate("ONNX Runtime", ways, open_runner, ("TensorRT engine: not executed",))
    return judge(model, config, candidate, seed=seed, advance=advance)


def _left_out(model: LoadedModel) -> tuple[str, ...]:
    chosen = model.config.chosen_layers
    return (f"the whole model: {partial_model(chosen)}",) if chosen else ()


@dataclass(frozen=True)
class Candidate:
    """What is judged: a runner that is opened in two ways, one after the other, which may not differ by a bit."""

    title: str
    ways: tuple[str, str]
    open: Callable[[int, str], CandidateRunner]
    """From pages in the pool and a way; NUM_SLOTS slots."""
    not_compared: tuple[str, ...]


def judge(
    model: LoadedModel,
    config: BuildConfig,
    candidate: Candidate,
    *,
    seed: int = 0,
    advance: Callable[[int], None] = lambda _: None,
) -> ValidationReport:
    """The report of every gate; raises ValidationError when an output that should be compared is missing.

    `advance` hears of the steps that were run, `num_steps` in all.
    """
    dtype, page_size, pools = COMPUTE_DTYPES[config.precision], config.page_size, model.pools(config)
    generator = np.random.default_rng(seed)
    prompt = generator.integers(0, model.config.vocab_size, PROMPT, dtype=np.int64)
    pages = num_pages(PROMPT, DECODE, page_size)
    noise = _noise(pools, pages, generator)

    reference = TorchRunner(model, pools, torch.float32)
    continuation = _greedy(reference, prompt, noise, page_size, advance)
    plan = scenarios(prompt, continuation, page_size)
    expected = _observe(reference, plan, noise, advance)
    del reference  # one copy of the weights at a time is enough
    floor = None
    if dtype != "float32":
        floor = _observe(TorchRunner(model, pools, getattr(torch, dtype)), plan, noise, advance)
    first, second = candidate.ways
    runner = candidate.open(pages, first)
    seen, runs_as = _observe(runner, plan, noise, advance), runner.runs_as
    del runner
    other = _observe(candidate.open(pages, second), plan, noise, advance)

    gates: list[Gate] = []
    for scenario in plan:
        name = scenario.name
        gates += _judge(name, seen[name], expected[name], floor[name] if floor else None, noise)
        gates.append(_same_bits(name, f"{first} and {second} differ", seen[name], other[name]))
    return ValidationReport(
        candidate=f"{candidate.title}, {runs_as}",
        reference="PyTorch, FP32",
        floor=f"PyTorch, {dtype}" if floor else "",
        tokens={"prompt": PROMPT, "decode": DECODE, "seed": seed},
        gates=tuple(gates),
        not_compared=(
            *(f"{name}: not exported" for name in model.not_exported),
            *candidate.not_compared,
            *_left_out(model),
        ),
    )


def num_steps(precision: str) -> int:
    """Steps that a validation runs: the greedy continuation's, and the scenarios' for each runner."""
    tokens = np.zeros(PROMPT, dtype=np.int64)
    steps = sum(len(scenario.steps) for scenario in scenarios(tokens, tokens[:DECODE], PROMPT))
    num_runners = 3 if precision == "fp32" else 4
    return 1 + DECODE + num_runners * steps


def _noise(
    pools: tuple[PoolSpec, ...], pages: int, generator: np.random.Generator
) -> dict[str, NDArray[np.float32]]:
    """Pools that hold what another sequence left: a runner that reads a fresh sequence's slot is found out.

    The values are exact in every dtype, so that all runners start from the same bits.
    """
    rows = {pool.name: pages if pool.is_paged else NUM_SLOTS for pool in pools}
    return {
        pool.name: generator.integers(-4, 5, (rows[pool.name], *pool.row_shape)).astype(np.float32)
        / np.float32(4)
        for pool in pools
    }


def _greedy(
    runner: Runner,
    prompt: NDArray[np.int64],
    noise: dict[str, NDArray[np.float32]],
    page_size: int,
    advance: Callable[[int], None],
) -> NDArray[np.int64]:
    """The reference's own greedy continuation: what every runner is then made to decode."""
    runner.reset(noise)
    tokens = np.zeros(DECODE, dtype=np.int64)
    steps = next(s for s in scenarios(prompt, tokens, page_size) if s.name == "decode").steps
    logits = runner.step(steps[0])
    advance(1)
    for i in range(DECODE):
        tokens[i] = int(logits[-1].argmax())
        steps[1 + i].input_ids[:] = tokens[i]
        logits = runner.step(steps[1 + i])
        advance(1)
    return tokens


def _observe(
    runner: Runner,
    plan: tuple[Scenario, ...],
    noise: dict[str, NDArray[np.float32]],
    advance: Callable[[int], None],
) -> dict[str, Observation]:
    found = {}
    for scenario in plan:
        runner.reset(noise)
        logits = []
        for inputs in scenario.steps:
            logits.append(runner.step(inputs))
            advance(1)
        found[scenario.name] = Observation(np.concatenate(logits), runner.pools())
    return found


def _judge(
    scenario: str,
    seen: Observation,
    expected: Observation,
    floor: Observation | None,
    noise: dict[str, NDArray[np.float32]],
) -> list[Gate]:
    """Every gate of one scenario: finiteness, logits, next token, and every pool without its scratch row."""
    missing = sorted(set(expected.pools) - set(seen.pools))
    if missing or seen.logits_RV.shape != expected.logits_RV.shape:
        raise ValidationError(
            f"{scenario}: {missing[0] if missing else 'logits'} was not produced by the graph"
        )
    gates: list[Gate] = []
    values = {"logits": (seen.logits_RV, expected.logits_RV, floor.logits_RV if floor else None)}
    for name, pool in expected.pools.items():
        # Only what the reference wrote is compared as numbers, so that noise cannot dilute an error; the rest must
        # be as it was, to the bit.
        written = _written(name, pool[1:], noise[name][1:])
        candidate = seen.pools[name][1:]
        stray = np.count_nonzero(candidate[~written] != noise[name][1:][~written])
        gates.append(Gate(scenario, name, "stray writes", float(stray), 0.0))
        values[name] = (
            candidate[written],
            pool[1:][written],
            floor.pools[name][1:][written] if floor else None,
        )
    for name, (candidate, reference, base) in values.items():
        broken = np.count_nonzero(~np.isfinite(candidate))
        gates.append(Gate(scenario, name, "not finite", float(broken), 0.0))
        if base is not None and not np.isfinite(base).all():
            # An infinite floor is a limit that everything passes.
            lost = np.count_nonzero(~np.isfinite(base))
            gates.append(Gate(scenario, name, "floor not finite", float(lost), 0.0))
        elif not broken:
            gates += _distances(scenario, name, candidate, reference, base)
    if np.isfinite(seen.logits_RV).all():
        gates += _next_token(scenario, seen.logits_RV, expected.logits_RV, floor.logits_RV if floor else None)
    return gates


def _written(name: str, pool: Array, noise: NDArray[np.float32]) -> NDArray[np.bool_]:
    """Which of a pool's values a step wrote: whole slots, and whole positions of pages.

    Not value by value: among the hundred millions of a large model's state, some equal their noise by chance.
    """
    within = (1, 2, 4) if name.startswith("kv_cache.") else tuple(range(1, pool.ndim))
    changed = (pool != noise).any(axis=within, keepdims=True)
    return np.broadcast_to(changed, pool.shape)


def _distances(
    scenario: str, name: str, candidate: Array, reference: Array, base: Array | None
) -> list[Gate]:
    """Relative L2, and at a lower precision the norm ratio too, each against its limit."""
    error = metrics.relative_l2(candidate, reference)
    if base is None:
        return [Gate(scenario, name, "relative L2", error, FP32_RELATIVE_L2)]
    ratio = metrics.norm_ratio_error(candidate, reference)
    floor, floor_ratio = metrics.relative_l2(base, reference), metrics.norm_ratio_error(base, reference)
    angle, floor_angle = 1 - metrics.cosine(candidate, reference), 1 - metrics.cosine(base, reference)
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


def _next_token(scenario: str, candidate: Array, reference: Array, base: Array | None) -> list[Gate]:
    """KL of the next-token distributions, and how clearly the reference prefers a token that was not chosen."""
    kl = metrics.kl_divergence(candidate, reference)
    flipped = metrics.flips(candidate, reference).max(initial=0.0)
    if base is None:
        scale = float(np.abs(reference).max())
        return [Gate(scenario, "logits", "greedy flip's margin", float(flipped), FP32_RELATIVE_L2 * scale)]
    floor_kl = metrics.kl_divergence(base, reference)
    floor_flipped = metrics.flips(base, reference).max(initial=0.0)
    # Where the floor flips nothing, a flip may still stand between two tokens closer than the floor's own error.
    margin = max(float(floor_flipped), float(np.abs(base - reference).max()))
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


def _same_bits(scenario: str, metric: str, bound: Observation, unbound: Observation) -> Gate:
    """One way against the other, as pools updated in place against pools fed and fetched: not a bit may differ."""
    differing = [
        name
        for name in bound.pools
        if not np.array_equal(bound.pools[name][1:], unbound.pools[name][1:], equal_nan=True)
    ]
    if not np.array_equal(bound.logits_RV, unbound.logits_RV, equal_nan=True):
        differing.append("logits")
    return Gate(scenario, differing[0] if differing else "all", metric, float(len(differing)), 0.0)
