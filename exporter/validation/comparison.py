"""A candidate beside a reference: both driven through the same steps on the same pools, and judged by gates.

What is compared stands in `scenarios.py`, what it is held to in `gates.py`, and how experts that are nearly tied are
kept out of it in `routing.py`. The reference is PyTorch (`torch_reference.py`), or what some runner showed elsewhere.
No PyTorch is imported here: a golden is compared on machines that have none.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from nemotrt.exporter.progress import Advance, ignore
from nemotrt.exporter.report.model import Gate, NotCompared, ValidationReport
from nemotrt.exporter.runtime.graph_file import OnnxGraph
from nemotrt.exporter.runtime.step import StepInputs
from nemotrt.exporter.validation import gates as judged
from nemotrt.exporter.validation.gates import Compared, Measured, Noise, Observation
from nemotrt.exporter.validation.graph_dtypes import ExpectedDtypes, dtype_gates
from nemotrt.exporter.validation.observations import next_token, router_agreement
from nemotrt.exporter.validation.routing import Choosing, RouterLogits, num_mismatches
from nemotrt.exporter.validation.runners.base import CandidateRunner, LedRunner, PoolShape, Runner
from nemotrt.exporter.validation.scenarios import NUM_SLOTS, Scenario, num_pages, scenarios

NUM_LEVELS = 9
"""Values that a pool holds at first: quarters from −1 to 1, exact in every dtype."""


@dataclass(frozen=True)
class Extent:
    """How much is driven: tokens of the prompt, tokens decoded after it, the seed of both and of the pools."""

    prompt: int
    decode: int
    seed: int
    vocab_size: int
    page_size: int

    @property
    def num_pages(self) -> int:
        """Pages of the pools, scratch included."""
        return num_pages(self.prompt, self.decode, self.page_size)

    @property
    def num_steps(self) -> int:
        """Steps of all scenarios."""
        tokens = np.zeros(self.prompt, dtype=np.int64)
        return sum(len(s.steps) for s in scenarios(tokens, tokens[: self.decode], self.page_size))


@dataclass(frozen=True)
class Recording:
    """What a reference showed in every scenario, and all that a candidate needs to be driven and judged alike."""

    reference: str
    """The reference in words."""
    baseline: str
    """What the limits derive from, in words; empty where they are absolute."""
    extent: Extent
    plan: tuple[Scenario, ...]
    noise: Noise
    seen: dict[str, Observation]
    choosing: tuple[Choosing, ...]
    baselines: dict[str, Measured]
    """For each scenario; none where limits are absolute."""
    dtypes: ExpectedDtypes
    """Of a graph's weights and pools."""
    not_compared: tuple[NotCompared, ...]


WATCHED = "watched"
"""A third way to open a runner: one that shows all that it can."""


@dataclass(frozen=True)
class Candidate:
    """What is judged: a runner that is opened in two ways, one after the other, which may not differ by a bit."""

    title: str
    ways: tuple[str, str]
    open: Callable[[int, str], CandidateRunner]
    """From pages in the pool and a way, or WATCHED; NUM_SLOTS slots."""
    not_compared: tuple[NotCompared, ...]
    graph: OnnxGraph | None = None
    """Whose dtypes are read, and whose layers are compared alone too; none of what cannot be, as an engine."""
    open_led: Callable[[], LedRunner] | None = None
    """None of what does not show by what it chooses experts."""


Beside = Callable[[str, Observation, tuple[RouterLogits, ...]], Compared]
"""From a scenario, what the candidate showed, and the router logits that it chose by: both on the same experts."""


def compare(recording: Recording, candidate: Candidate, beside: Beside, advance: Advance) -> ValidationReport:
    """The report of every gate of whole steps, and of a graph's dtypes.

    Raises ValidationError when an output of the reference is missing.
    """
    pages = recording.extent.num_pages
    first, second = candidate.ways
    runner = candidate.open(pages, first)
    seen, runs_as = observe(runner, recording.plan, recording.noise, advance), runner.runs_as
    del runner
    other = observe(candidate.open(pages, second), recording.plan, recording.noise, advance)

    gates: list[Gate] = []
    differences = []
    for scenario in recording.plan:
        name = scenario.name
        against, baseline = beside(name, seen[name], other[name].routers), recording.baselines.get(name)
        gates += judged.gates(name, against, baseline, recording.noise)
        gates.append(judged.same_bits(name, seen[name], other[name]))
        differences.append(next_token(scenario, against, baseline))
    if candidate.graph:
        gates += dtype_gates(candidate.graph.model, recording.dtypes)
    extent = recording.extent
    return ValidationReport(
        candidate=f"{candidate.title}, {runs_as}",
        reference=recording.reference,
        baseline=recording.baseline,
        tokens={"prompt": extent.prompt, "decode": extent.decode, "seed": extent.seed},
        gates=tuple(gates),
        routing_mismatches={
            name: num_routing_mismatches(recording, name, found.routers) for name, found in other.items()
        },
        next_token=tuple(found for found in differences if found),
        routers=router_agreement(recording.choosing, recording.seen, other),
        not_compared=(*candidate.not_compared, *recording.not_compared),
    )


def num_routing_mismatches(recording: Recording, name: str, routers: tuple[RouterLogits, ...]) -> int:
    """How often, in a scenario, another runner chose other experts; 0 where it does not show them."""
    if not any(routers):
        return 0
    return num_mismatches(recording.choosing, recording.seen[name].routers, routers)


@dataclass(frozen=True)
class Leader:
    """A reference that cannot be run again: where a near tie made a candidate choose other experts, it follows."""

    recording: Recording
    candidate: Candidate

    def beside(self, name: str, seen: Observation, routers: tuple[RouterLogits, ...]) -> Compared:
        """What the candidate showed in a scenario, or shows when near ties are decided as the reference did."""
        expected = self.recording.seen[name]
        if self.candidate.open_led is None or not num_routing_mismatches(self.recording, name, routers):
            return on_own_choice(seen, routers, expected)
        runner = self.candidate.open_led()
        scenario = next(scenario for scenario in self.recording.plan if scenario.name == name)
        told = [self._told(name, step) for step in expected.routers]
        led = observe_one(
            runner,
            scenario,
            self.recording.noise,
            step=lambda number: runner.step_with_routing(scenario.steps[number], told[number]),
        )
        return Compared(led, expected)

    def _told(self, name: str, step: RouterLogits) -> RouterLogits:
        """The reference's router logits of a step at near ties, NaN elsewhere: what is clear, the candidate decides."""
        limits = judged.score_limits(self.recording.baselines.get(name), len(step))
        return tuple(
            np.where(layer.near_tie(logits_TE, limit)[:, None], logits_TE, np.float32(np.nan))
            for layer, logits_TE, limit in zip(self.recording.choosing, step, limits, strict=True)
        )


def prompt_of(extent: Extent) -> NDArray[np.int64]:
    """The prompt's tokens, drawn evenly from the vocabulary."""
    generator = np.random.default_rng(extent.seed)
    return generator.integers(0, extent.vocab_size, extent.prompt, dtype=np.int64)


def noise_of(pools: Iterable[PoolShape], extent: Extent) -> Noise:
    """Pools that hold what another sequence left: a runner that reads a fresh sequence's slot is found out.

    The values are exact in every dtype, so that all runners start from the same bits. They are drawn from the bit
    generator itself, whose stream NumPy promises to keep, so that every machine makes them again of the seed.
    """
    bits = np.random.PCG64(extent.seed)
    noise: Noise = {}
    for pool in pools:
        shape = (extent.num_pages if pool.is_paged else NUM_SLOTS, *pool.row_shape)
        count = int(np.prod(shape))
        drawn = bits.random_raw(-(-count // 8)).astype("<u8").view(np.uint8)[:count] % NUM_LEVELS
        noise[pool.name] = ((drawn.astype(np.float32) - NUM_LEVELS // 2) / np.float32(4)).reshape(shape)
    return noise


def greedy(runner: Runner, extent: Extent, noise: Noise, advance: Advance) -> NDArray[np.int64]:
    """The runner's own greedy continuation of the prompt: what every runner is then made to decode."""
    runner.reset(noise)
    tokens = np.zeros(extent.decode, dtype=np.int64)
    plan = scenarios(prompt_of(extent), tokens, extent.page_size)
    steps = next(s for s in plan if s.name == "decode").steps
    logits = runner.step(steps[0])
    advance(1)
    for i in range(extent.decode):
        tokens[i] = int(logits[-1].argmax())
        steps[1 + i].input_ids[:] = tokens[i]
        logits = runner.step(steps[1 + i])
        advance(1)
    return tokens


def observe(
    runner: Runner, plan: tuple[Scenario, ...], noise: Noise, advance: Advance
) -> dict[str, Observation]:
    """What a runner shows in every scenario."""
    return {scenario.name: observe_one(runner, scenario, noise, advance=advance) for scenario in plan}


def observe_one(
    runner: Runner,
    scenario: Scenario,
    noise: Noise,
    *,
    advance: Advance = ignore,
    step: Callable[[int], NDArray[np.float64]] | None = None,
) -> Observation:
    """What a runner shows in one scenario; `step` runs the step of that number in another way than plainly."""
    runner.reset(noise)
    logits, routers = [], []
    for number, inputs in enumerate(scenario.steps):
        logits.append(step(number) if step else runner.step(inputs))
        routers.append(without_padding(runner.router_logits(), inputs))
        advance(1)
    return Observation(np.concatenate(logits), runner.pools(), tuple(routers))


def without_padding(router_logits: RouterLogits, inputs: StepInputs) -> RouterLogits:
    """Of a step's own tokens."""
    return tuple(logits_TE[: inputs.query_start[-1]] for logits_TE in router_logits)


def on_own_choice(seen: Observation, routers: tuple[RouterLogits, ...], expected: Observation) -> Compared:
    """What a runner showed beside a reference that chose the same experts."""
    return Compared(replace(seen, routers=routers), expected)
