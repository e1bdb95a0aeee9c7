"""Compares a candidate with a reference: both run the same steps on the same pools, and gates check the differences.

`plan.py` has the steps, `gates.py` the limits, and `routing.py` explains near ties between experts. The reference
is PyTorch (`references/pytorch.py`), a reference file, or another bundle. PyTorch is not imported here, because a
reference file is compared on machines that do not have it.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import product

import numpy as np

from nemotrt.exporter.progress import Advance, ignore
from nemotrt.exporter.report.model import (
    Gate,
    NextToken,
    NotCompared,
    RouterAgreement,
    ValidationReport,
    WorstToken,
)
from nemotrt.exporter.runtime.graph_file import OnnxGraph
from nemotrt.exporter.runtime.step import StepInputs
from nemotrt.exporter.validation import metrics, routing
from nemotrt.exporter.validation.envelope import PoolSizes
from nemotrt.exporter.validation.gates import (
    ExpectedDtypes,
    ScenarioErrors,
    dtype_gates,
    same_bits,
    scenario_gates,
    score_limits,
)
from nemotrt.exporter.validation.metrics import Array, Values
from nemotrt.exporter.validation.observation import Noise, Observation, observed
from nemotrt.exporter.validation.plan import DECODE, Scenarios, Workload
from nemotrt.exporter.validation.routing import RouterLogits, RouterPolicy, num_mismatches
from nemotrt.exporter.validation.runners.base import CandidateRunner, Mode, Runner

NUM_WORST, NUM_BEFORE = 5, 24
"""Worst tokens per scenario, and how many tokens before each are reported."""
DIGITS = 4
"""Significant digits of a row's KL."""


@dataclass(frozen=True)
class ReferenceRun:
    """What a reference produced in every scenario, and all that is needed to run and compare a candidate."""

    reference: str
    """The reference's name in reports."""
    workload: Workload
    scenarios: Scenarios
    noise: dict[PoolSizes, Noise]
    """The initial contents of the pools, by their sizes."""
    observations: dict[str, Observation]
    policies: tuple[RouterPolicy, ...]
    dtypes: ExpectedDtypes
    """The dtypes that the graph's weights and pools must have."""
    not_compared: tuple[NotCompared, ...]
    """What this reference leaves out."""
    baseline: str = ""
    """What the limits derive from; empty if they are absolute."""
    baselines: dict[str, ScenarioErrors] = field(default_factory=dict)
    """The rounding baseline of each scenario; empty if limits are absolute."""

    def noise_of(self, scenario: str) -> Noise:
        """The initial contents of a scenario's pools."""
        return self.noise[self.workload.sizes_of(scenario)]

    def num_mismatches(self, scenario: str, routers: Sequence[RouterLogits]) -> int:
        """How often a token is routed to other experts than in the reference."""
        return num_mismatches(self.policies, self.observations[scenario].routers, routers)


@dataclass(frozen=True)
class Candidate:
    """What is compared: a runner that is opened in two modes, one after the other."""

    title: str
    modes: tuple[Mode, Mode]
    """Their results must be bitwise equal; the second outputs router logits if the candidate can."""
    open: Callable[[PoolSizes, Mode], CandidateRunner]
    """Opens a runner with pools of these sizes, in a mode."""
    not_compared: tuple[NotCompared, ...]
    graph: OnnxGraph | None = None
    """The graph whose dtypes and parts are compared too; None for an engine."""
    open_forced: Callable[[], Runner] | None = None
    """Opens a runner whose expert routing can be forced; None if there is none."""


AlignRouting = Callable[[str, Observation], tuple[Observation, Observation]]
"""Takes a scenario and the candidate's observation; returns the candidate's and the reference's, routed alike.

One of the two runs again if a token was routed to other experts.
"""


def compare(
    run: ReferenceRun, candidate: Candidate, align: AlignRouting, advance: Advance = ignore
) -> ValidationReport:
    """The report of every gate of whole steps, and of a graph's dtypes.

    Raises ValidationError if the candidate lacks an output of the reference.
    """
    runs_as = ""
    observations: dict[Mode, dict[str, Observation]] = {mode: {} for mode in candidate.modes}
    for mode, (sizes, noise) in product(candidate.modes, run.noise.items()):
        runner = candidate.open(sizes, mode)
        group = {name: steps for name, steps in run.scenarios.items() if run.noise_of(name) is noise}
        observations[mode] |= observe_all(runner, group, run.noise_of, advance)
        runs_as = runner.runs_as
        del runner  # Else the next runner's weights would be in memory next to these.
    first, second = (observations[mode] for mode in candidate.modes)

    gates: list[Gate] = []
    next_tokens: list[NextToken | None] = []
    for name, steps in run.scenarios.items():
        baseline = run.baselines.get(name)
        aligned = align(name, replace(first[name], routers=second[name].routers))
        gates += scenario_gates(name, *aligned, baseline)
        gates.append(same_bits(name, first[name], second[name]))
        next_tokens.append(next_token(name, steps, *aligned, baseline))
    if candidate.graph:
        gates += dtype_gates(candidate.graph.model, run.dtypes)
    workload = run.workload
    return ValidationReport(
        candidate=f"{candidate.title} ({runs_as})",
        reference=run.reference,
        baseline=run.baseline,
        tokens={"prompt": workload.prompt, "decode": workload.decode, "seed": workload.seed},
        gates=tuple(gates),
        routing_mismatches={
            name: run.num_mismatches(name, observation.routers) for name, observation in second.items()
        },
        next_token=tuple(comparison for comparison in next_tokens if comparison),
        routers=router_agreement(run.policies, run.observations, second),
        not_compared=(*candidate.not_compared, *run.not_compared),
    )


def force_routing(run: ReferenceRun, candidate: Candidate) -> AlignRouting:
    """Aligns routing with a reference that cannot run again: the candidate runs again, with near ties forced.

    Tokens without a near tie keep the candidate's own experts, so that a wrong router is found.
    """

    def near_ties(scenario: str, step: RouterLogits) -> RouterLogits:
        """The reference's router logits of near ties, NaN elsewhere."""
        limits = score_limits(run.baselines.get(scenario), len(step))
        return tuple(
            np.where(policy.near_tie(logits_TE, limit)[:, None], logits_TE, np.float32(np.nan))
            for policy, logits_TE, limit in zip(run.policies, step, limits, strict=True)
        )

    def align(scenario: str, observation: Observation) -> tuple[Observation, Observation]:
        expected = run.observations[scenario]
        if candidate.open_forced is None or not run.num_mismatches(scenario, observation.routers):
            return observation, expected
        forced = [near_ties(scenario, step) for step in expected.routers]
        runner = candidate.open_forced()
        return observe(runner, run.scenarios[scenario], run.noise_of(scenario), forced=forced), expected

    return align


def observe_all(
    runner: Runner, scenarios: Scenarios, noise_of: Callable[[str], Noise], advance: Advance
) -> dict[str, Observation]:
    """What a runner produces in every scenario."""
    return {
        name: observe(runner, steps, noise_of(name), advance=advance) for name, steps in scenarios.items()
    }


def observe_greedy(
    runner: Runner, workload: Workload, noises: Mapping[PoolSizes, Noise], advance: Advance
) -> tuple[Scenarios, dict[str, Observation]]:
    """The scenarios with the runner's own greedy continuation of the prompt, and what it produces in each."""
    tokens = np.zeros(workload.decode, dtype=np.int64)
    steps = workload.scenarios(tokens)[DECODE]

    def continue_greedily(step: int, logits_RV: Values) -> None:
        if step < len(tokens):
            tokens[step] = logits_RV[-1].argmax()
            steps[step + 1].input_ids[:] = tokens[step]

    def noise_of(scenario: str) -> Noise:
        return noises[workload.sizes_of(scenario)]

    decoded = observe(runner, steps, noise_of(DECODE), advance=advance, after_step=continue_greedily)
    scenarios = workload.scenarios(tokens)
    others = {name: steps for name, steps in scenarios.items() if name != DECODE}
    return scenarios, observe_all(runner, others, noise_of, advance) | {DECODE: decoded}


def observe(
    runner: Runner,
    steps: Sequence[StepInputs],
    noise: Noise,
    *,
    forced: Sequence[RouterLogits] = (),
    advance: Advance = ignore,
    after_step: Callable[[int, Values], None] = lambda step, logits_RV: None,
) -> Observation:
    """What a runner produces over the steps; `forced` router logits of each step, if any, choose the experts."""
    runner.reset(noise)
    logits, routers = [], []
    for number, inputs in enumerate(steps):
        logits.append(runner.step(inputs, forced[number]) if forced else runner.step(inputs))
        num_tokens = inputs.query_start[-1]
        routers.append(tuple(logits_TE[:num_tokens] for logits_TE in runner.router_logits()))
        after_step(number, logits[-1])
        advance(1)
    return observed(logits, runner.pool, noise, steps, routers)


def next_token(
    scenario: str,
    steps: Sequence[StepInputs],
    candidate: Observation,
    reference: Observation,
    baseline: ScenarioErrors | None,
) -> NextToken | None:
    """How the distributions of a scenario differ; None if logits are not finite, which a gate reports."""
    ours_RV, reference_RV = metrics.in_fp64(candidate.logits_RV, reference.logits_RV)
    if not (np.isfinite(ours_RV).all() and np.isfinite(reference_RV).all()):
        return None
    kl = metrics.kl_divergence(ours_RV, reference_RV)
    agreement = float((ours_RV.argmax(1) == reference_RV.argmax(1)).mean())
    margins = metrics.mismatch_margins(ours_RV, reference_RV)
    tie = metrics.TIE * float(np.abs(reference_RV).max())
    if baseline and baseline.kl:
        tie = baseline.max_logit_error
    mismatches = np.flatnonzero(margins > 2 * tie)
    before = _contexts(steps)
    return NextToken(
        scenario=scenario,
        kl=_rounded(kl),
        baseline_kl=_rounded(baseline.kl) if baseline else (),
        mean=float(kl.mean()),
        mean_error=float(kl.std(ddof=1) / math.sqrt(len(kl))) if len(kl) > 1 else 0.0,
        p999=float(np.quantile(kl, 0.999)),
        top1_agreement=agreement,
        top1_agreement_error=math.sqrt(agreement * (1 - agreement) / len(kl)),
        matched=int(mismatches[0]) if len(mismatches) else len(kl),
        worst=tuple(
            WorstToken(
                row=int(row),
                kl=float(kl[row]),
                before=before[row],
                reference=int(reference_RV[row].argmax()),
                candidate=int(ours_RV[row].argmax()),
                margin=float(margins[row]),
            )
            for row in np.argsort(-kl, kind="stable")[:NUM_WORST]
        ),
    )


def _rounded(values: Array | Sequence[float]) -> tuple[float, ...]:
    return tuple(float(f"{value:.{DIGITS}g}") for value in values)


def _contexts(steps: Sequence[StepInputs]) -> list[tuple[int, ...]]:
    """For each row of logits the last tokens of its sequence, the row's own included."""
    history: dict[int, list[int]] = {}
    contexts = []
    for inputs in steps:
        rows: dict[int, tuple[int, ...]] = {}
        for b, slot in enumerate(inputs.slot.tolist()):
            tokens = history.setdefault(slot, [])
            if not inputs.context_len[b] and inputs.query_start[b + 1] > inputs.query_start[b]:
                tokens.clear()
            for t in range(inputs.query_start[b], inputs.query_start[b + 1]):
                tokens.append(int(inputs.input_ids[t]))
                rows[t] = tuple(tokens[-NUM_BEFORE:])
        contexts += [rows[t] for t in inputs.logits_row.tolist()]
    return contexts


def router_agreement(
    policies: Sequence[RouterPolicy],
    reference: Mapping[str, Observation],
    candidate: Mapping[str, Observation],
) -> tuple[RouterAgreement, ...]:
    """Each MoE layer's routing over all scenarios; empty if the candidate does not output router logits."""
    if not policies or not all(any(observation.routers) for observation in candidate.values()):
        return ()
    ours = routing.concatenated([step for name in candidate for step in candidate[name].routers])
    theirs = routing.concatenated([step for name in candidate for step in reference[name].routers])
    agreements = []
    for policy, ours_TE, theirs_TE in zip(policies, ours, theirs, strict=True):
        differs_T, margin_T = policy.differs(ours_TE, theirs_TE), policy.margin(theirs_TE)
        agreements.append(
            RouterAgreement(
                layer=policy.layer,
                tokens=len(differs_T),
                routing_mismatches=int(differs_T.sum()),
                median_margin=float(np.median(margin_T)),
                mismatch_margin=float(margin_T[differs_T].max(initial=0.0)),
                score_error=routing.score_error(ours_TE, theirs_TE),
            )
        )
    return tuple(agreements)
