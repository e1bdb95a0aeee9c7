"""How the error of the carried state develops over a long decode, with identical tokens and the same experts.

Two errors are measured. *In the model*, a state's error includes the errors of everything before it, and PyTorch at the
graph's precision has it too: the rounding baseline. That hides what the state itself loses, for example if it is kept
in FP16. So each *recurrence alone* is also replayed in FP64 on the inputs that the graph itself gave it: only the loss
from step to step remains, and its limit is that of FP32.

Legend: T steps, B sequences, H heads, P head dim, G groups, N state size, E experts, V vocabulary.
"""

from collections import defaultdict
from collections.abc import Callable, Sequence
from functools import partial
from itertools import zip_longest
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from nemotrt.exporter.checkpoint import weights
from nemotrt.exporter.checkpoint.loaded_model import LoadedModel
from nemotrt.exporter.config import BuildConfig
from nemotrt.exporter.progress import Advance, ignore
from nemotrt.exporter.report.model import Drift, DriftCurve, Gate, Metric
from nemotrt.exporter.runtime.step import StepInputs
from nemotrt.exporter.validation import metrics
from nemotrt.exporter.validation.gates import BASELINE_FACTOR, FP32_RELATIVE_L2
from nemotrt.exporter.validation.plan import SEQUENCES, WINDOW, LongDecode, empty_pools
from nemotrt.exporter.validation.routing import RouterLogits
from nemotrt.exporter.validation.runners.base import CandidateRunner, Recurrence, Runner
from nemotrt.exporter.validation.runners.torch import TorchRunner, num_threads, threads, torch_step
from nemotrt.plugins.contract import DType, PoolSpec
from nemotrt.plugins.selective_scan.reference import reference as scan

SCENARIO = "state drift"


class _Snapshot(NamedTuple):
    """What a runner produced up to one mark."""

    states: dict[str, NDArray[np.float32]]
    """The sequences' rows of every recurrent pool."""
    logits_BTV: NDArray[np.float32]
    """The logits of the last steps before the mark."""
    routers_BTE: RouterLogits = ()


class DriftComparison:
    """A long decode by the candidate, followed by PyTorch on the same tokens and with the same experts.

    The candidate runs first; then each PyTorch network follows while it is loaded: FP32, and the baseline's.
    """

    def __init__(self, model: LoadedModel, config: BuildConfig, decode: LongDecode) -> None:
        self.decode = decode
        pools = model.pools(config)
        self._zeros = empty_pools(pools, decode.sizes)
        self._recurrent = [spec.name for spec in pools if not spec.is_paged]
        self._replay = _Replay(model, pools)
        self._candidate: list[_Snapshot] = []
        self._followers: list[list[_Snapshot]] = []

    def run_candidate(self, runner: CandidateRunner, advance: Advance = ignore) -> None:
        """Decode token by token, and replay each recurrence; reports each step."""
        runner.reset(self._zeros)
        for first, watched, last in self.decode.spans:
            logits, routers = [], []
            for t in range(first, last):
                inputs = self.decode.step(t, t + 1, watched)
                logits.append(runner.step(inputs).astype(np.float32))
                routers.append(runner.router_logits())
                self._replay.step(inputs, runner.recurrences())
                advance(1)
            logits_BTV = np.stack([rows for rows in logits if len(rows)], axis=1)
            routers_BTE = tuple(np.stack(steps, axis=1) for steps in zip(*routers, strict=True))
            snapshot = _Snapshot(self._states(runner), logits_BTV, routers_BTE)
            self._candidate.append(snapshot)
            self._replay.record_errors(snapshot.states)

    def follow(self, runner: TorchRunner, advance: Advance = ignore) -> None:
        """Run PyTorch with the candidate's experts, all tokens up to a mark at once; reports each mark.

        A state that is narrower than FP32 loses precision in every step, so then the tokens run one by one.
        """
        runner.reset(self._zeros)
        snapshots = []
        for (first, watched, last), candidate in zip(self.decode.spans, self._candidate, strict=True):
            stride = 1 if runner.has_narrow_state else last - first
            rows = []
            for t in range(first, last, stride):
                offset = slice(t - first, t - first + stride)
                forced = tuple(
                    layer[:, offset].reshape(-1, layer.shape[-1]) for layer in candidate.routers_BTE
                )
                logits = runner.step(self.decode.step(t, t + stride, watched), forced)
                if len(logits):
                    rows.append(logits.astype(np.float32).reshape(SEQUENCES, -1, logits.shape[-1]))
            snapshots.append(_Snapshot(self._states(runner), np.concatenate(rows, axis=1)))
            advance(1)
        self._followers.append(snapshots)

    def result(self) -> Drift:
        """Every error at every mark, against the network that followed first; the second one is the baseline."""
        reference, *baselines = self._followers

        def errors(distance: Callable[[_Snapshot, _Snapshot], float]) -> list[tuple[float, ...]]:
            """At each mark: the candidate's, and the baseline's if there is one."""
            return [tuple(map(distance, side, reference)) for side in (self._candidate, *baselines)]

        curves = []
        for name in self._recurrent:
            curves.append(curve(name, Metric.RELATIVE_L2, *errors(partial(_state_error, name))))
            if name in self._replay.errors:
                alone = tuple(self._replay.errors[name]), tuple(self._replay.baselines[name])
                curves.append(curve(name, Metric.RECURRENCE, *alone))
        curves.append(curve("logits", Metric.MEAN_KL, *errors(_mean_kl)))
        return Drift(self.decode.marks, SEQUENCES, tuple(curves))

    def _states(self, runner: Runner) -> dict[str, NDArray[np.float32]]:
        return {name: runner.pool(name)[1 : 1 + SEQUENCES].copy() for name in self._recurrent}


def curve(
    output: str, metric: Metric, values: tuple[float, ...], baseline: tuple[float, ...] = ()
) -> DriftCurve:
    """The errors with their limits: from the baseline at each mark, so that no error grows faster than PyTorch's."""
    limits = tuple(BASELINE_FACTOR * base for base in baseline)
    if not limits and metric is not Metric.MEAN_KL:
        limits = (FP32_RELATIVE_L2,) * len(values)
    return DriftCurve(output, metric, values, baseline, limits)


def gates(drift: Drift) -> list[Gate]:
    """For each curve with limits, the gate at the mark that uses most of its limit."""
    return [_gate(curve, drift.steps) for curve in drift.curves if curve.limits]


def _gate(curve: DriftCurve, steps: Sequence[int]) -> Gate:
    marks = [
        Gate(SCENARIO, curve.output, curve.metric, *numbers)
        for numbers in zip_longest(curve.values, curve.limits, curve.baseline)
    ]
    if curve.metric is Metric.MEAN_KL:
        # A mean over few rows is mostly noise.
        spans = np.diff([0, *steps])
        marks = [mark for mark, span in zip(marks, spans, strict=True) if span >= WINDOW] or marks[-1:]
    for metric, numbers in (
        (Metric.NOT_FINITE, [mark.value for mark in marks]),
        (Metric.BASELINE_NOT_FINITE, [mark.baseline for mark in marks if mark.baseline is not None]),
    ):
        if broken := np.count_nonzero(~np.isfinite(numbers)):
            return Gate(SCENARIO, curve.output, metric, float(broken), 0.0)
    return max(marks, key=lambda gate: gate.limit_fraction)


def _state_error(pool: str, *snapshots: _Snapshot) -> float:
    return metrics.relative_l2(*metrics.in_fp64(*(snapshot.states[pool] for snapshot in snapshots)))


def _mean_kl(*snapshots: _Snapshot) -> float:
    """The mean KL over the rows before a mark, in nats."""
    logits = metrics.in_fp64(*(snapshot.logits_BTV for snapshot in snapshots))
    return float(metrics.kl_divergence(*logits).mean())


class _Replay:
    """Every recurrence in FP64 on given inputs; and, if its pool is narrower than FP32, as the pool stores it."""

    def __init__(self, model: LoadedModel, pools: tuple[PoolSpec, ...]) -> None:
        dt_min, dt_max = model.config.time_step_limit
        self._scan = partial(scan, dt_min=dt_min, dt_max=dt_max)
        self._specs = {spec.name: spec for spec in pools if spec.kind == "ssm_state"}
        self._weights = {
            name: [_head_weight(model, spec, which) for which in ("A", "dt_bias")]
            for name, spec in self._specs.items()
        }
        self._num_threads = num_threads(
            {name: torch.empty(spec.row_shape, device="meta") for name, spec in self._specs.items()}
        )
        self._exact: dict[str, Tensor] = {}
        self._stored: dict[str, Tensor] = {}
        self.errors: dict[str, list[float]] = defaultdict(list)
        """At each mark: the relative L2 of a state's worst head."""
        self.baselines: dict[str, list[float]] = defaultdict(list)
        """At each mark: the same error of a state that is only rounded to the pool's dtype."""

    def step(self, inputs: StepInputs, recurrences: dict[str, Recurrence]) -> None:
        """Advance the recurrences whose inputs are visible by one step."""
        with threads(self._num_threads):
            for name, given in recurrences.items():
                spec = self._specs[name]
                zeros = torch.zeros(1 + SEQUENCES, *spec.row_shape, dtype=torch.float64)
                self._exact[name] = self._next(name, given, inputs, self._exact.get(name, zeros))
                if spec.dtype is not DType.FLOAT32:
                    stored = self._stored.get(name, torch.zeros_like(zeros, dtype=spec.dtype.torch))
                    self._stored[name] = self._next(name, given, inputs, stored)

    def _next(self, name: str, given: Recurrence, inputs: StepInputs, state: Tensor) -> Tensor:
        """The state after a step, computed in its dtype, or in FP32 if that is narrower."""
        dtype = torch.promote_types(state.dtype, torch.float32)
        x, dt, b = (torch.from_numpy(values).to(dtype) for values in given)
        a, dt_bias = self._weights[name]
        query_start, context_len, slot, _ = torch_step(inputs)
        # C and D only affect y, which is not used.
        return self._scan(x, dt, a, b, b, dt_bias, dt_bias, state, query_start, context_len, slot)[1]

    def record_errors(self, states: dict[str, NDArray[np.float32]]) -> None:
        """Add the errors at a mark, at which the candidate has these states."""
        for name in self._exact:
            self.errors[name].append(self._worst_head(name, states[name].astype(np.float64)))
        for name, stored in self._stored.items():
            self.baselines[name].append(self._worst_head(name, stored[1:].double().numpy()))

    def _worst_head(self, name: str, state_BHPN: NDArray[np.float64]) -> float:
        exact_BHPN = self._exact[name][1:].numpy()
        error_H, norm_H = (
            np.einsum("bhpn,bhpn->h", values, values) for values in (state_BHPN - exact_BHPN, exact_BHPN)
        )
        # A head that no token has moved is zero on both sides.
        return float(np.sqrt(np.divide(error_H, norm_H, out=error_H.copy(), where=norm_H > 0)).max())


def _head_weight(model: LoadedModel, spec: PoolSpec, which: str) -> Tensor:
    name = f"backbone.layers.{spec.layer}.mixer.{which}"
    return weights.read(model.weights[name], spec.row_shape[:1], DType.FLOAT32)
