"""Validate: the graph against PyTorch on identical tokens and carried state, judged by gates that can fail.

What is compared stands in `scenarios.py`, what it is held to in `gates.py`, and how experts that are nearly tied
are kept out of it in `routing.py`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from nemotrt.exporter import gates as judged
from nemotrt.exporter.artifacts import Gate, LayerError, LoadedModel, ValidationReport
from nemotrt.exporter.config import COMPUTE_DTYPES, BuildConfig
from nemotrt.exporter.gates import Compared, Observation
from nemotrt.exporter.layer_selection import partial_model
from nemotrt.exporter.layerwise import compare_layers
from nemotrt.exporter.observations import next_token, router_agreement
from nemotrt.exporter.routing import Choosing, RouterLogits, num_rerouted
from nemotrt.exporter.runners import CandidateRunner, GraphRunner, Runner, TorchRunner
from nemotrt.exporter.runtime.step import StepInputs
from nemotrt.exporter.scenarios import NUM_SLOTS, Scenario, num_pages, scenarios
from nemotrt.model.pools import PoolSpec

PROMPT, DECODE = 96, 64
"""Tokens of the prompt, and tokens decoded after it."""


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

    candidate = Candidate("ONNX Runtime", ways, open_runner, ("TensorRT engine: not executed",), graph)
    return judge(model, config, candidate, seed=seed, advance=advance)


NO_TEXT = "what quantisation costs: no text was given (nemo-export validate --eval FILE)"


def _left_out(model: LoadedModel) -> tuple[str, ...]:
    chosen = model.config.chosen_layers
    partial = (f"the whole model: {partial_model(chosen)}",) if chosen else ()
    return (*partial, NO_TEXT) if model.config.recipe else partial


@dataclass(frozen=True)
class Candidate:
    """What is judged: a runner that is opened in two ways, one after the other, which may not differ by a bit."""

    title: str
    ways: tuple[str, str]
    open: Callable[[int, str], CandidateRunner]
    """From pages in the pool and a way; NUM_SLOTS slots."""
    not_compared: tuple[str, ...]
    graph: Path | None = None
    """Of which each layer is compared alone too; none of what cannot be cut, as an engine."""


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
    expected = _Reference(
        model, pools, plan, noise, _observe(reference, plan, noise, advance), reference.choosing
    )
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
    differences = []
    for scenario in plan:
        name = scenario.name
        base = None
        if floor:
            beside = expected.beside(name, floor[name], floor[name].routers)
            base = judged.measured(beside, noise)
        against = expected.beside(name, seen[name], other[name].routers)
        gates += judged.gates(name, against, base, noise)
        gates.append(judged.same_bits(name, f"{first} and {second} differ", seen[name], other[name]))
        differences.append(next_token(scenario, against, base))
    alone, layers = _alone(model, config, candidate.graph, plan, noise, advance)
    return ValidationReport(
        candidate=f"{candidate.title}, {runs_as}",
        reference="PyTorch, FP32",
        floor=f"PyTorch, {dtype}" if floor else "",
        tokens={"prompt": PROMPT, "decode": DECODE, "seed": seed},
        gates=(*gates, *alone),
        rerouted={name: expected.num_rerouted(name, found.routers) for name, found in other.items()},
        next_token=tuple(found for found in differences if found),
        layers=layers,
        routers=router_agreement(expected.choosing, expected.seen, other),
        not_compared=(
            *(f"{name}: not exported" for name in model.not_exported),
            *candidate.not_compared,
            *_left_out(model),
        ),
    )


def _alone(
    model: LoadedModel,
    config: BuildConfig,
    graph: Path | None,
    plan: tuple[Scenario, ...],
    noise: dict[str, NDArray[np.float32]],
    advance: Callable[[int], None],
) -> tuple[list[Gate], tuple[LayerError, ...]]:
    """The gates of each layer alone, on the steps that hold every kind of batch; none of a graph that cannot be cut."""
    if graph is None:
        return [], ()
    steps = next(scenario.steps for scenario in plan if scenario.name == "mixed batch")
    return compare_layers(model, config, graph, steps, noise, advance=advance)


def num_steps(precision: str, num_layers: int) -> int:
    """Steps that a validation runs: the greedy continuation's, the scenarios' for each runner, and each part alone."""
    tokens = np.zeros(PROMPT, dtype=np.int64)
    steps = sum(len(scenario.steps) for scenario in scenarios(tokens, tokens[:DECODE], PROMPT))
    num_runners = 3 if precision == "fp32" else 4
    return 1 + DECODE + num_runners * steps + num_layers + 2


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
        logits, routers = [], []
        for inputs in scenario.steps:
            logits.append(runner.step(inputs))
            routers.append(_without_padding(runner.router_logits(), inputs))
            advance(1)
        found[scenario.name] = Observation(np.concatenate(logits), runner.pools(), tuple(routers))
    return found


def _without_padding(router_logits: RouterLogits, inputs: StepInputs) -> RouterLogits:
    return tuple(logits_TE[: inputs.query_start[-1]] for logits_TE in router_logits)


class _Reference:
    """What the reference shows in each scenario, by itself and on another runner's choice of experts."""

    def __init__(
        self,
        model: LoadedModel,
        pools: tuple[PoolSpec, ...],
        plan: tuple[Scenario, ...],
        noise: dict[str, NDArray[np.float32]],
        seen: dict[str, Observation],
        choosing: tuple[Choosing, ...],
    ) -> None:
        self._model, self._pools, self._noise = model, pools, noise
        self._plan = {scenario.name: scenario for scenario in plan}
        self.seen, self.choosing = seen, choosing

    def num_rerouted(self, name: str, routers: tuple[RouterLogits, ...]) -> int:
        """How often another runner chose other experts; 0 where it does not show them."""
        if not any(routers):
            return 0
        return num_rerouted(self.choosing, self.seen[name].routers, routers)

    def beside(self, name: str, seen: Observation, routers: tuple[RouterLogits, ...]) -> Compared:
        """What another runner showed, whose choice is in `routers`, beside the reference on that choice."""
        seen = replace(seen, routers=routers)
        if not self.num_rerouted(name, routers):
            return Compared(seen, self.seen[name])
        runner = TorchRunner(self._model, self._pools, torch.float32)
        runner.reset(self._noise)
        logits, own = [], []
        for inputs, leader in zip(self._plan[name].steps, routers, strict=True):
            logits.append(runner.step(inputs, leader))
            own.append(_without_padding(runner.router_logits(), inputs))
        return Compared(seen, Observation(np.concatenate(logits), runner.pools(), tuple(own)))
