"""One part of the model run three ways on the same inputs, and every result compared with PyTorch in FP32.

A runtime runs the part of the graph. PyTorch runs the same part in FP32, as the reference, and at the graph's
precision, as the rounding baseline. Padding, and rows of a pool that a step does not write, are not compared.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from nemotrt.exporter.checkpoint.loaded_model import LoadedModel
from nemotrt.exporter.config import BuildConfig
from nemotrt.exporter.runtime.graph_file import OnnxGraph
from nemotrt.exporter.runtime.step import StepInputs
from nemotrt.exporter.validation import metrics
from nemotrt.exporter.validation.envelope import Envelope
from nemotrt.exporter.validation.gates import BASELINE_FACTOR, FP32_RELATIVE_L2, Pair
from nemotrt.exporter.validation.observation import Noise, num_stray, written_places
from nemotrt.exporter.validation.parts.all_experts import all_experts
from nemotrt.exporter.validation.parts.subgraphs import GraphPart, split
from nemotrt.exporter.validation.parts.torch_parts import OpCall, TorchPart
from nemotrt.exporter.validation.plan import MIXED, Workload, envelope_parts, scenarios
from nemotrt.exporter.validation.routing import RouterLogits, score_error
from nemotrt.exporter.validation.runners.base import FORCED
from nemotrt.plugins.contract import NEXT

SMALL_DECADES = 3
"""Over how many decades small rows vary: the input of a gated norm is a product of two small values."""

LARGE, LARGEST = 100.0, 8192.0
"""How much larger than usual large rows are, and the largest element that scaling may give them: FP16 ends at 65504."""


class PartRunner(Protocol):
    """A part of the graph in some runtime, without state of its own."""

    runs_as: str
    """The runtime, the precision and the device, in words."""

    def run(self, feeds: Mapping[str, NDArray[Any]]) -> dict[str, NDArray[Any]]:
        """Every output by name; `feeds` may hold more than the part's inputs."""


@dataclass
class ValueComparison:
    """One value of a part over the steps: a runner's, the reference's, and which elements are compared."""

    steps: list[tuple[NDArray[Any], NDArray[Any], Any]] = field(default_factory=list)
    shapes: tuple[tuple[int, ...], tuple[int, ...]] | None = None
    """The runner's shape and the reference's if they differ; the runner's elements are then NaN."""

    def add(self, candidate: Any, expected: Any, rows: Any) -> None:
        """Add a step's tensors or arrays; `rows` indexes the elements that are compared."""
        ours, reference = as_array(candidate), as_array(expected)
        if ours.shape != reference.shape:
            self.shapes = (ours.shape, reference.shape)
            ours = np.full(reference.shape, np.nan)
        self.steps.append((ours, reference, rows))

    def forget_places(self) -> None:
        """Store only the compared elements of the last step, without their places."""
        ours, reference, rows = self.steps[-1]
        self.steps[-1] = ours[rows], reference[rows], slice(None)

    def first(self, count: int) -> ValueComparison:
        """The comparison of the first `count` steps."""
        return ValueComparison(self.steps[:count])

    @property
    def pair(self) -> Pair:
        """The compared elements of all steps, the runner's and the reference's."""
        ours, reference = zip(*((a[rows], b[rows]) for a, b, rows in self.steps), strict=True)
        return np.concatenate(ours, dtype=np.float64), np.concatenate(reference, dtype=np.float64)

    @property
    def error(self) -> float:
        """Relative L2 over all steps; infinite if a value is NaN."""
        error = metrics.relative_l2(*self.pair)
        return error if not np.isnan(error) else float("inf")

    def worst(self) -> tuple[int, tuple[int, ...], float, float]:
        """The step and the index of the largest difference, and both elements there."""
        candidates: list[tuple[float, int, tuple[int, ...], float, float]] = []
        for step, (ours, reference, rows) in enumerate(self.steps):
            difference = np.zeros(reference.shape)
            difference[rows] = np.nan_to_num(np.abs(ours[rows] - reference[rows]), nan=np.inf)
            if difference.size:
                place = np.unravel_index(difference.argmax(), difference.shape)
                index = tuple(map(int, place))
                candidates.append(
                    (float(difference[place]), step, index, float(ours[place]), float(reference[place]))
                )
        return max(candidates, key=lambda candidate: candidate[0])[1:]


StepCalls = tuple[list[OpCall], list[OpCall], int]
"""The ops that the reference called in a step, those that the baseline called, and the number of tokens."""


@dataclass
class PartComparison:
    """The values of one part over the steps by the graph's names, against the reference on the same inputs."""

    candidate: dict[str, ValueComparison] = field(default_factory=dict)
    baseline: dict[str, ValueComparison] = field(default_factory=dict)
    """PyTorch at the graph's precision; empty if that is FP32."""
    calls: list[StepCalls] = field(default_factory=list)
    out_of_bounds: dict[str, int] = field(default_factory=dict)
    """By pool: values that the runner changed although the reference did not write them."""
    router_errors: list[tuple[float, float]] = field(default_factory=list)
    """The largest error of a router's score in each step, and the baseline's; empty for a part without experts."""
    at_limits: PartComparison | None = None
    """The same at the limits of the profile, for the parts that run there; without calls."""

    def add_routers(self, own: RouterLogits, reference: TorchPart, baseline: TorchPart) -> None:
        """Add a step's own router logits of the runner, without padding, and of PyTorch's parts."""
        expected, rounded = reference.router_logits(), baseline.router_logits()
        for own_TE, expected_TE, rounded_TE in zip(own, expected, rounded, strict=True):
            count = len(own_TE)
            self.router_errors.append(
                (
                    score_error(own_TE, expected_TE[:count]),
                    score_error(rounded_TE[:count], expected_TE[:count]),
                )
            )


PartRunners = tuple[PartRunner, TorchPart, TorchPart | None, Sequence[str]]
"""A runner, the reference, the rounding baseline if the graph is not FP32, and the names of the compared values."""


def run_parts(
    model: LoadedModel,
    config: BuildConfig,
    graph: OnnxGraph,
    workload: Workload,
    open_runners: Callable[[GraphPart], PartRunners],
    envelope: Envelope | None = None,
) -> Iterator[tuple[GraphPart, PartComparison]]:
    """Every part and its comparison; a part's input is the reference's output of the previous part.

    With an `envelope`, the first part of each form runs at its limits too, on inputs drawn from those of its steps.
    """
    firsts = envelope_parts(model) if envelope else ()
    steps = mixed_steps(workload)
    dtype, pools = config.dtype.torch, model.pools(config)
    flows: list[Tensor] = [torch.from_numpy(inputs.input_ids) for inputs in steps]
    for part in split(graph):
        noise = workload.noise(pool for pool in pools if pool.name in part.pools)
        # The input is rounded so that all three runners start from the same bits.
        rounded = [flow if flow.dtype == torch.int64 else flow.to(dtype) for flow in flows]
        runners = open_runners(part)
        flows, comparison = run_part(part, noise, list(zip(rounded, steps, strict=True)), *runners)
        if envelope and part.name in firsts:
            deep_steps = at_limits(part, rounded, envelope, workload, model.config.norm_eps)
            noise = workload.noise((pool for pool in pools if pool.name in part.pools), envelope.sizes)
            imposed: Sequence[NDArray[np.float32]] = ()
            if part.router_logits:
                deep_steps, imposed = all_experts(model.config, deep_steps, workload.seed)
            deep = run_part(part, noise, deep_steps, *runners, in_full=False, imposed=imposed)
            comparison.at_limits = deep[1]
        del runners  # Its weights would stay in memory next to those of the following part.
        yield part, comparison
        del comparison


def at_limits(
    part: GraphPart, flows: Sequence[Tensor], envelope: Envelope, workload: Workload, eps: float
) -> list[tuple[Tensor, StepInputs]]:
    """Steps at the limits, each with rows of the part's usual inputs in random order, scaled as in `of_all_sizes`.

    A part without pools takes no notice of sequences: it runs the first step only. `eps` is that of the norms.
    """
    steps = envelope.steps(workload.vocab_size, workload.seed)[: None if part.pools else 1]
    if flows[0].dtype == torch.int64:
        return [(torch.from_numpy(inputs.input_ids), inputs) for inputs in steps]
    generator = torch.Generator().manual_seed(workload.seed)
    rows = torch.cat(list(flows))

    def drawn(count: int) -> Tensor:
        chosen = rows[torch.randint(len(rows), (count,), generator=generator)].float()
        return of_all_sizes(chosen, eps, generator).to(rows.dtype)

    return [(drawn(len(inputs.input_ids)), inputs) for inputs in steps]


def of_all_sizes(rows: Tensor, eps: float, generator: torch.Generator) -> Tensor:
    """Rows scaled by 0.5 to 1.5; besides, every fourth is small, and every fourth large.

    The mean square of a small row is at most `eps`, which a norm of usual rows hides. In the sum of a large row and
    what a layer adds to it the row counts most, so that the sum shows a wrong factor of the row.
    """
    scale_R1 = 0.5 + torch.rand(len(rows), 1, generator=generator)
    rms_R1 = rows.square().mean(1, keepdim=True).sqrt()
    small_R1 = eps**0.5 * 10 ** (-SMALL_DECADES * torch.rand(len(rows), 1, generator=generator)) / rms_R1
    scale_R1[1::4] = torch.where(rms_R1 > 0, small_R1, 1.0)[1::4]
    largest = float(rows.abs().max())
    scale_R1[2::4] *= min(LARGE, LARGEST / largest) if 0 < largest < LARGEST else 1.0
    return rows * scale_R1


def mixed_steps(workload: Workload) -> tuple[StepInputs, ...]:
    """The steps that every part runs alone: the mixed batch, on random tokens."""
    tokens = workload.random_tokens(workload.prompt + workload.decode)
    return scenarios(tokens[: workload.prompt], tokens[workload.prompt :], workload.page_size)[MIXED]


def run_part(
    part: GraphPart,
    noise: Noise,
    steps: Sequence[tuple[Tensor, StepInputs]],
    runner: PartRunner,
    reference: TorchPart,
    baseline: TorchPart | None,
    names: Sequence[str],
    *,
    in_full: bool = True,
    imposed: Sequence[NDArray[np.float32]] = (),
) -> tuple[list[Tensor], PartComparison]:
    """The reference's output in each step, and the comparison of the values in `names`.

    `steps` holds each step's value from the previous part, and its step inputs. Every pool starts as in `noise`, and
    PyTorch takes the experts that the runner chose. Without `in_full`, the calls of ops are not kept, and of pools only
    the compared rows. Router logits [T, E] that are `imposed` on a step, NaN where there are none, route both sides.
    """
    comparison = PartComparison()
    state: dict[str, NDArray[Any]] = {name: noise[name] for name in part.pools}
    reference.reset(noise)
    if baseline:
        baseline.reset(noise)
    flows_out = []
    done: list[StepInputs] = []
    for number, (flow, inputs) in enumerate(steps):
        done.append(inputs)
        count = int(inputs.query_start[-1])
        routers = [imposed[number] if imposed else _own_routing(part, inputs) for _ in part.router_logits]
        feeds = {f"{FORCED}{i}": logits_TE for i, logits_TE in enumerate(routers)}
        results = runner.run(_feeds(part, flow, inputs) | state | feeds)
        state = {name: results[NEXT + name] for name in state}
        own = tuple(results[name][:count].astype(np.float32) for name in part.router_logits)
        routing = tuple(
            np.where(np.isnan(logits_TE[:count]), own_TE, logits_TE[:count])
            for logits_TE, own_TE in zip(routers, own, strict=True)
        )
        is_imposed_T = ~np.isnan(routers[0][:count, 0]) if routers else None
        flows_out.append(reference.step(flow, inputs, routing, is_imposed_T))
        calls = reference.calls
        rows = {name: _compared_rows(part, name, reference.values[name], done) for name in names}
        _add(comparison.candidate, results, reference.values, rows, in_full)
        if baseline:
            baseline.step(flow, inputs, routing, is_imposed_T)
            _add(comparison.baseline, baseline.values, reference.values, rows, in_full)
        comparison.add_routers(own, reference, baseline or reference)
        if in_full:
            comparison.calls.append((calls, baseline.calls if baseline else calls, count))
    for name, values in state.items():
        if NEXT + name in rows:
            comparison.out_of_bounds[name] = num_stray(values, noise[name], rows[NEXT + name])
    return flows_out, comparison


def _own_routing(part: GraphPart, inputs: StepInputs) -> NDArray[np.float32]:
    """Router logits [T, E] that impose nothing."""
    (name,) = part.router_logits
    return np.full((len(inputs.input_ids), int(part.axes(name)[1])), np.nan, dtype=np.float32)


def _feeds(part: GraphPart, flow: Tensor, inputs: StepInputs) -> dict[str, NDArray[Any]]:
    fields = inputs.as_dict()
    return fields if part.flow_in in fields else fields | {part.flow_in: flow.float().numpy()}


def _compared_rows(part: GraphPart, name: str, values: Any, done: Sequence[StepInputs]) -> Any:
    """The index of the elements of a value that are compared after these steps."""
    if name.startswith(NEXT):
        return written_places(name.removeprefix(NEXT), values, done)
    count = int(done[-1].query_start[-1])
    return slice(count) if part.axes(name)[:1] == ("T",) else slice(None)


def _add(
    comparisons: dict[str, ValueComparison],
    values: Mapping[str, Any],
    reference: Mapping[str, Any],
    rows: Mapping[str, Any],
    in_full: bool,
) -> None:
    for name, compared in rows.items():
        comparison = comparisons.setdefault(name, ValueComparison())
        comparison.add(values[name], reference[name], compared)
        if name.startswith(NEXT) and not in_full:
            comparison.forget_places()


def as_array(values: Any) -> NDArray[Any]:
    """A tensor or an array, in FP32 if it is narrower; nothing else is copied."""
    if not isinstance(values, Tensor):
        return np.asarray(values)
    is_narrow = values.is_floating_point() and values.dtype.itemsize < 4
    return (values.float() if is_narrow else values).numpy()


def error_limit(baseline: float | None, *, is_fp32: bool) -> float:
    """The limit on a value's relative L2, from the baseline's; at least FP32's limit if the value is FP32."""
    if baseline is None:
        return FP32_RELATIVE_L2
    if not np.isfinite(baseline):
        return 0.0
    return max(BASELINE_FACTOR * baseline, FP32_RELATIVE_L2 if is_fp32 else 0.0)
