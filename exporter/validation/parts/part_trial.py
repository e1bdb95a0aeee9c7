"""One part of the model run three ways on the same inputs, and what each gave beside the reference.

The ways: the graph's cut, PyTorch in FP32 (the reference), and PyTorch at the graph's precision, whose loss is the
baseline. Only what a step says counts: its tokens without padding, the rows of a pool that it writes.

Legend: T tokens, E experts.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from nemotrt.exporter.runtime.step import StepInputs
from nemotrt.exporter.validation import gates as judged
from nemotrt.exporter.validation import metrics
from nemotrt.exporter.validation.gates import BASELINE_FACTOR, FP32_RELATIVE_L2, Pair
from nemotrt.exporter.validation.metrics import Array
from nemotrt.exporter.validation.parts.subgraphs import Cut
from nemotrt.exporter.validation.parts.torch_parts import OpCall, TorchPart
from nemotrt.exporter.validation.routing import RouterLogits

FLOAT = 1
"""onnx.TensorProto's number for FP32."""


class PartRunner(Protocol):
    """A cut of the graph in some runtime, without state of its own."""

    runs_as: str
    """On what, in words."""

    def run(self, feeds: Mapping[str, NDArray[Any]]) -> dict[str, NDArray[Any]]:
        """Every output by its name, of the inputs that the part takes of `feeds`, which may hold others."""


@dataclass
class Beside:
    """One value over the steps, by a runner and by the reference, and which rows of it count."""

    steps: list[tuple[Array, Array, Any]] = field(default_factory=list)
    shapes: tuple[tuple[int, ...], tuple[int, ...]] | None = None
    """Where they differ in a step, the runner's and the reference's: then nothing of the runner's is a number."""

    def add(self, ours: Array, reference: Array, rows: Any) -> None:
        """A further step; `rows` index both."""
        if ours.shape != reference.shape:
            self.shapes = (ours.shape, reference.shape)
            ours = np.full(reference.shape, np.nan)
        self.steps.append((ours, reference, rows))

    def after(self, count: int) -> Beside:
        """As it was after so many steps."""
        return Beside(self.steps[:count])

    @property
    def pair(self) -> Pair:
        """What counts of all steps, one after the other."""
        ours, reference = zip(*((a[rows], b[rows]) for a, b, rows in self.steps), strict=True)
        return np.concatenate(ours), np.concatenate(reference)

    def worst(self) -> tuple[int, tuple[int, ...], float, float]:
        """Step and index of the largest difference, and what stands there on either side."""
        found: list[tuple[float, int, tuple[int, ...], float, float]] = []
        for step, (ours, reference, rows) in enumerate(self.steps):
            apart = np.zeros(reference.shape)
            apart[rows] = np.abs(ours[rows] - reference[rows])
            if apart.size:
                place = np.unravel_index(np.nan_to_num(apart, nan=np.inf).argmax(), apart.shape)
                index = tuple(map(int, place))
                found.append((float(apart[place]), step, index, float(ours[place]), float(reference[place])))
        return max(found, key=lambda entry: np.inf if np.isnan(entry[0]) else entry[0])[1:]


Compared = dict[str, Beside]
"""By the graph's names."""


@dataclass
class PartRun:
    """What one part gave over the steps, three ways."""

    shown: Compared = field(default_factory=dict)
    baseline: Compared = field(default_factory=dict)
    """Of PyTorch at the graph's precision; empty where that is FP32."""
    calls: list[tuple[list[OpCall], list[OpCall]]] = field(default_factory=list)
    """Of each step, the ops that the reference called, and those at the graph's precision."""


class PartTrial:
    """One part, three ways, step by step; what it gave is in `found`, for the values in `compared`."""

    def __init__(
        self,
        cut: Cut,
        runner: PartRunner,
        reference: TorchPart,
        baseline: TorchPart | None,
        noise: Mapping[str, NDArray[np.float32]],
        compared: Sequence[str],
    ) -> None:
        """Every pool starts as in `noise`; the runner shows all that is `compared`, and the router logits."""
        self._cut, self._runner, self._reference, self._baseline = cut, runner, reference, baseline
        self._noise, self._compared = noise, compared
        self._state: dict[str, NDArray[Any]] = {name: noise[name] for name in cut.pools}
        reference.reset(noise)
        if baseline:
            baseline.reset(noise)
        self.found = PartRun()

    def step(self, flow: Tensor, inputs: StepInputs) -> Tensor:
        """What flows on from the reference, on the experts that the graph chose."""
        count = int(inputs.query_start[-1])
        shown = self._runner.run(feeds(self._cut, flow, inputs) | self._state)
        self._state = {name: shown[f"next.{name}"] for name in self._state}
        router = self._cut.router_logits
        leader = (shown[router][:count].astype(np.float32),) if router else ()
        result = self._reference.step(flow, inputs, leader)
        calls = self._reference.calls
        self._add(self.found.shown, shown, count)
        if self._baseline:
            self._baseline.step(flow, inputs)
            own = _first(self._baseline.router_logits(), count)
            if own:
                # The baseline's choice of experts; a layer that has experts has no pools to spoil.
                self._reference.step(flow, inputs, own)
            self._add(self.found.baseline, self._baseline.values, count)
        self.found.calls.append((calls, self._baseline.calls if self._baseline else calls))
        return result

    def _add(self, into: Compared, values: Mapping[str, Any], count: int) -> None:
        for name in self._compared:
            beside = into.setdefault(name, Beside())
            ours, reference = as_array(values[name]), as_array(self._reference.values[name])
            beside.add(ours, reference, self._rows(name, reference, count))

    def _rows(self, name: str, reference: Array, count: int) -> Any:
        """What of a value counts."""
        pool = name.removeprefix("next.")
        if pool != name:
            return written(pool, reference, self._noise[pool])
        return slice(count) if self._cut.axis(name) == "T" else slice(None)


def feeds(cut: Cut, flow: Tensor, inputs: StepInputs) -> dict[str, NDArray[Any]]:
    """All inputs of a part but its pools."""
    fields = inputs.as_dict()
    return fields if cut.flow_in in fields else fields | {cut.flow_in: flow.float().numpy()}


def written(pool: str, after: Array, before: NDArray[Any]) -> NDArray[np.bool_]:
    """What a step wrote of a pool, its scratch row left out."""
    found = judged.written_mask(pool, after, before).copy()
    found[0] = False
    return found


def as_array(values: Any) -> Array:
    """A tensor or array in FP64."""
    return values.double().numpy() if isinstance(values, Tensor) else values.astype(np.float64)


def limit(baseline: float | None, *, is_fp32: bool) -> float:
    """What the relative L2 of a value may be; one in FP32 is never held to less than FP32 is."""
    if baseline is None:
        return FP32_RELATIVE_L2
    if not np.isfinite(baseline):
        return 0.0
    return max(BASELINE_FACTOR * baseline, FP32_RELATIVE_L2 if is_fp32 else 0.0)


def error(beside: Beside) -> float:
    """Relative L2 over all steps; infinite where a value is NaN."""
    found = metrics.relative_l2(*beside.pair)
    return found if not np.isnan(found) else float("inf")


def _first(router_logits: RouterLogits, count: int) -> RouterLogits:
    return tuple(logits_TE[:count] for logits_TE in router_logits)
