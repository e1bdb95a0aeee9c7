"""How far the carried state departs over a thousand decode steps, with identical tokens and the same experts.

Two questions are kept apart. *In the model*, a state's error is that of everything before it, and PyTorch at the
graph's precision has it too: the baseline. What the state itself loses, as one that is kept in FP16, hides in that. So
each recurrence is also judged *alone*: replayed in FP64 on what the graph itself fed it, nothing but what is lost from
step to step is left, and its limit is that of FP32.

Legend: B sequences, H heads, P head dim, G groups, N state size, E experts, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from nemotrt.exporter.checkpoint import weights
from nemotrt.exporter.checkpoint.loaded_model import LoadedModel
from nemotrt.exporter.config import BuildConfig
from nemotrt.exporter.progress import Advance, ignore
from nemotrt.exporter.report.model import Drift, DriftCurve, Gate, Metric
from nemotrt.exporter.runtime.step import StepInputs, pages_of
from nemotrt.exporter.validation import metrics
from nemotrt.exporter.validation.gates import BASELINE_FACTOR, FP32_RELATIVE_L2
from nemotrt.exporter.validation.routing import RouterLogits
from nemotrt.exporter.validation.runners.base import CandidateRunner, Recurrence
from nemotrt.exporter.validation.runners.torch import (
    TorchRunner,
    num_threads,
    pool_dtype,
    threads,
    torch_step,
)
from nemotrt.exporter.validation.scenarios import NUM_SLOTS
from nemotrt.plugins.contract import DType, PoolSpec
from nemotrt.plugins.selective_scan.reference import reference as scan

SEQUENCES = 2
"""Decoded side by side."""

WINDOW = 30
"""Steps before each mark whose logits are compared: so many of each sequence."""

SCENARIO = "state drift"


@dataclass(frozen=True)
class _Segment:
    """Steps from `first` to before `last`, after which the state is looked at; those from `watched` on want logits."""

    first: int
    watched: int
    last: int


@dataclass(frozen=True)
class Plan:
    """Random tokens [B, steps] of fresh sequences, and the steps after which their state is looked at."""

    tokens_BT: NDArray[np.int64]
    page_size: int

    @property
    def num_steps(self) -> int:
        """Tokens of each sequence."""
        return int(self.tokens_BT.shape[1])

    @property
    def num_pages(self) -> int:
        """Pages of all sequences, scratch included."""
        return 1 + SEQUENCES * pages_of(self.num_steps, self.page_size)

    @property
    def marks(self) -> tuple[int, ...]:
        """1, 2, 5, 10, 20, 50 … and the last."""
        series = (factor * 10**power for power in range(6) for factor in (1, 2, 5))
        return (*(mark for mark in series if mark < self.num_steps), self.num_steps)

    @property
    def segments(self) -> tuple[_Segment, ...]:
        """What lies between the marks."""
        starts = (0, *self.marks[:-1])
        return tuple(
            _Segment(first, max(first, last - WINDOW), last)
            for first, last in zip(starts, self.marks, strict=True)
        )

    def step(self, first: int, last: int, watched: int) -> StepInputs:
        """One step with the tokens from `first` to before `last` of each sequence."""
        count = last - first
        tokens_BT = self.tokens_BT[:, first:last]
        rows_BT = np.arange(tokens_BT.size, dtype=np.int32).reshape(tokens_BT.shape)
        pages = np.arange(1, self.num_pages, dtype=np.int32).reshape(SEQUENCES, -1)
        return StepInputs(
            input_ids=tokens_BT.flatten(),
            query_start=np.arange(SEQUENCES + 1, dtype=np.int32) * np.int32(count),
            context_len=np.full(SEQUENCES, first, dtype=np.int32),
            slot=np.arange(1, SEQUENCES + 1, dtype=np.int32),
            page_table=pages,
            logits_row=rows_BT[:, max(watched - first, 0) :].flatten(),
        )


@dataclass
class _Trace:
    """What a runner showed, an entry for each mark."""

    states: list[dict[str, NDArray[np.float32]]] = field(default_factory=list)
    """Every recurrent pool's rows of the sequences."""
    logits_BTV: list[NDArray[np.float32]] = field(default_factory=list)
    routers_BTE: list[RouterLogits] = field(default_factory=list)

    def add(
        self,
        pools: dict[str, NDArray[np.float64]],
        specs: Sequence[PoolSpec],
        logits_BTV: NDArray[np.float32],
        routers_BTE: RouterLogits,
    ) -> None:
        """The next mark."""
        held = {spec.name: pools[spec.name][1 : 1 + SEQUENCES] for spec in _recurrent(specs)}
        self.states.append({name: rows.astype(np.float32) for name, rows in held.items()})
        self.logits_BTV.append(logits_BTV)
        self.routers_BTE.append(routers_BTE)


def measure(
    model: LoadedModel,
    config: BuildConfig,
    open_runner: Callable[[int], CandidateRunner],
    *,
    num_steps: int,
    seed: int = 0,
    advance: Advance = ignore,
) -> Drift:
    """The errors of every recurrent state at each mark, and of the next token before it.

    `open_runner` takes the pages of its pool. One runner is held at a time; `advance` hears of `num_runs` steps.
    """
    dtype, pools = config.dtype, model.pools(config)
    generator = np.random.default_rng([seed, num_steps])
    tokens_BT = generator.integers(0, model.config.vocab_size, (SEQUENCES, num_steps), dtype=np.int64)
    plan = Plan(tokens_BT, config.page_size)
    replay = _Replay(model, pools)
    seen, alone = _candidate(open_runner(plan.num_pages), plan, pools, replay, advance)
    expected = _torch(model, pools, torch.float32, plan, seen, advance)
    baseline = None
    if dtype != "float32":
        baseline = _torch(model, pools, getattr(torch, dtype), plan, seen, advance)
    curves = []
    for name in (spec.name for spec in _recurrent(pools)):
        base = _errors(baseline, expected, name) if baseline else ()
        curves.append(curve(name, Metric.RELATIVE_L2, _errors(seen, expected, name), base))
        if errors := tuple(at_mark[name] for at_mark in alone if name in at_mark):
            base = tuple(replay.baselines.get(name, ()))
            curves.append(curve(name, Metric.RECURRENCE, errors, base))
    kl, base = _kl(seen, expected), _kl(baseline, expected) if baseline else ()
    curves.append(curve("logits", Metric.MEAN_KL, kl, base))
    return Drift(plan.marks, SEQUENCES, tuple(curves))


def curve(output: str, metric: Metric, values: tuple[float, ...], baseline: tuple[float, ...]) -> DriftCurve:
    """The errors with their limits: from the baseline at each mark, so that no error grows faster than PyTorch's."""
    limits = tuple(BASELINE_FACTOR * base for base in baseline)
    if not limits and metric is not Metric.MEAN_KL:
        limits = (FP32_RELATIVE_L2,) * len(values)
    return DriftCurve(output, metric, values, baseline, limits)


def num_runs(precision: str, num_steps: int) -> int:
    """Steps that `measure` tells of."""
    marks = len(Plan(np.zeros((SEQUENCES, num_steps), dtype=np.int64), 1).marks) if num_steps else 0
    return num_steps + marks * (1 if precision == "fp32" else 2)


def gates(drift: Drift) -> list[Gate]:
    """For each curve the gate at the mark that uses most of its limit."""
    return [_gate(curve, drift.steps) for curve in drift.curves if curve.limits]


def _gate(curve: DriftCurve, steps: Sequence[int]) -> Gate:
    indices = list(range(len(steps)))
    if curve.metric is Metric.MEAN_KL:
        # A mean over few rows is mostly noise.
        indices = [i for i, span in enumerate(np.diff([0, *steps])) if span >= WINDOW] or indices[-1:]
    baseline = [curve.baseline[i] for i in indices] if curve.baseline else [None] * len(indices)
    values = [curve.values[i] for i in indices]
    for metric, numbers in ((Metric.NOT_FINITE, values), (Metric.BASELINE_NOT_FINITE, baseline)):
        if broken := sum(number is not None and not np.isfinite(number) for number in numbers):
            return Gate(SCENARIO, curve.output, metric, float(broken), 0.0)
    marks = [
        Gate(SCENARIO, curve.output, curve.metric, value, curve.limits[i], base)
        for i, value, base in zip(indices, values, baseline, strict=True)
    ]
    return max(marks, key=lambda gate: gate.limit_fraction)


def _candidate(
    runner: CandidateRunner,
    plan: Plan,
    pools: tuple[PoolSpec, ...],
    replay: _Replay,
    advance: Advance,
) -> tuple[_Trace, list[dict[str, float]]]:
    """What the candidate shows, a token at a time, and each recurrence's own error at each mark."""
    runner.reset(_zeros(pools, plan.num_pages))
    trace, alone = _Trace(), []
    for segment in plan.segments:
        logits, routers = [], []
        for t in range(segment.first, segment.last):
            inputs = plan.step(t, t + 1, segment.watched)
            logits.append(runner.step(inputs).astype(np.float32))
            routers.append(runner.router_logits())
            replay.step(inputs, runner.recurrences())
            advance(1)
        rows = np.stack([rows for rows in logits if len(rows)], axis=1)
        by_layer = (np.stack(steps, axis=1) for steps in zip(*routers, strict=True))
        trace.add(runner.pools(), pools, rows, tuple(by_layer))
        alone.append(replay.errors(trace.states[-1]))
    return trace, alone


def _torch(
    model: LoadedModel,
    pools: tuple[PoolSpec, ...],
    dtype: torch.dtype,
    plan: Plan,
    leader: _Trace,
    advance: Advance,
) -> _Trace:
    """What PyTorch shows on the leader's choice of experts: all tokens between two marks at once.

    A state that is narrower than FP32 loses in every step, and is stepped so.
    """
    runner = TorchRunner(model, pools, dtype)
    runner.reset(_zeros(pools, plan.num_pages))
    is_narrow = any(pool_dtype(spec, dtype) != torch.float32 for spec in pools if spec.kind == "ssm_state")
    trace = _Trace()
    for segment, routers_BTE in zip(plan.segments, leader.routers_BTE, strict=True):
        stride = 1 if is_narrow else segment.last - segment.first
        rows = []
        for first in range(segment.first, segment.last, stride):
            here = slice(first - segment.first, first - segment.first + stride)
            led = tuple(layer[:, here].reshape(-1, layer.shape[-1]) for layer in routers_BTE)
            logits = runner.step(plan.step(first, first + stride, segment.watched), led)
            if len(logits):
                rows.append(logits.astype(np.float32).reshape(SEQUENCES, -1, logits.shape[-1]))
        trace.add(runner.pools(), pools, np.concatenate(rows, axis=1), ())
        advance(1)
    return trace


def _recurrent(pools: Sequence[PoolSpec]) -> list[PoolSpec]:
    return [spec for spec in pools if not spec.is_paged]


def _zeros(pools: Sequence[PoolSpec], num_pages: int) -> dict[str, NDArray[np.float32]]:
    rows = {spec.name: num_pages if spec.is_paged else NUM_SLOTS for spec in pools}
    return {spec.name: np.zeros((rows[spec.name], *spec.row_shape), dtype=np.float32) for spec in pools}


def _errors(trace: _Trace, expected: _Trace, pool: str) -> tuple[float, ...]:
    pairs = zip(trace.states, expected.states, strict=True)
    return tuple(metrics.relative_l2(*(side[pool].astype(np.float64) for side in pair)) for pair in pairs)


def _kl(trace: _Trace, expected: _Trace) -> tuple[float, ...]:
    """The mean over the rows before each mark, in nats."""
    pairs = zip(trace.logits_BTV, expected.logits_BTV, strict=True)
    return tuple(
        float(metrics.kl_divergence(*(side.astype(np.float64) for side in pair)).mean()) for pair in pairs
    )


class _Replay:
    """Every recurrence in FP64, and as its pool holds it where that is narrower than FP32; on given inputs."""

    def __init__(self, model: LoadedModel, pools: tuple[PoolSpec, ...]) -> None:
        self._dt_min, self._dt_max = model.config.time_step_limit
        self._specs = {spec.name: spec for spec in pools if spec.kind == "ssm_state"}
        self._weights = {
            name: [_head_weight(model, spec, which) for which in ("A", "dt_bias")]
            for name, spec in self._specs.items()
        }
        self._num_threads = num_threads(
            {name: torch.empty(spec.row_shape, device="meta") for name, spec in self._specs.items()}
        )
        self._exact: dict[str, Tensor] = {}
        self._held: dict[str, Tensor] = {}
        self.baselines: dict[str, list[float]] = {}

    def step(self, inputs: StepInputs, recurrences: dict[str, Recurrence]) -> None:
        """One step of the recurrences that are seen."""
        with threads(self._num_threads):
            for name, seen in recurrences.items():
                self._exact[name] = self._next(name, seen, inputs, self._exact, torch.float64, torch.float64)
                held = getattr(torch, self._specs[name].dtype)
                if held != torch.float32:
                    self._held[name] = self._next(name, seen, inputs, self._held, torch.float32, held)

    def _next(
        self,
        name: str,
        seen: Recurrence,
        inputs: StepInputs,
        states: dict[str, Tensor],
        dtype: torch.dtype,
        held: torch.dtype,
    ) -> Tensor:
        empty = torch.zeros(1 + SEQUENCES, *self._specs[name].row_shape, dtype=held)
        x, dt, b = (torch.from_numpy(values).to(dtype) for values in (seen.x, seen.dt, seen.B))
        a, dt_bias = self._weights[name]
        packed = torch_step(inputs)
        state = states.get(name, empty)
        # C and D make y, which is not looked at.
        _, next_state = scan(
            x,
            dt,
            a,
            b,
            b,
            dt_bias,
            dt_bias,
            state,
            packed.query_start,
            packed.context_len,
            packed.slot,
            dt_min=self._dt_min,
            dt_max=self._dt_max,
        )
        return next_state

    def errors(self, states: dict[str, NDArray[np.float32]]) -> dict[str, float]:
        """Of each state the worst head's relative L2; of the narrow ones the baseline is kept in `baselines`."""
        for name, held in self._held.items():
            self.baselines.setdefault(name, []).append(self._worst_head(name, held[1:].double().numpy()))
        return {name: self._worst_head(name, states[name].astype(np.float64)) for name in self._exact}

    def _worst_head(self, name: str, state_BHPN: NDArray[np.float64]) -> float:
        exact_BHPN = self._exact[name][1:].numpy()
        lost_H, norm_H = (
            np.einsum("bhpn,bhpn->h", values, values) for values in (state_BHPN - exact_BHPN, exact_BHPN)
        )
        # A head that no token has moved is zero on both sides.
        return float(np.sqrt(np.divide(lost_H, norm_H, out=lost_H.copy(), where=norm_H > 0)).max())


def _head_weight(model: LoadedModel, spec: PoolSpec, which: str) -> Tensor:
    name = f"backbone.layers.{spec.layer}.mixer.{which}"
    return weights.read(model.weights[name], spec.row_shape[:1], DType.FLOAT32)
