"""Bisect: the first layer, in it the first op, and of that the tensor, that departs from PyTorch.

Each part of the graph runs alone on the reference's own inputs with every value inside it as an output. PyTorch's
counterparts come from the program that the part was lowered from, run operator by operator on the real weights: in
FP32, and at the graph's precision for the baseline.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray

from nemotrt.exporter.artifacts import TracedPart
from nemotrt.exporter.checkpoint import weights
from nemotrt.exporter.checkpoint.loaded_model import LoadedModel
from nemotrt.exporter.config import BuildConfig
from nemotrt.exporter.lowering.graph_writer import value_names
from nemotrt.exporter.progress import Advance, ignore
from nemotrt.exporter.report.model import Bisection, DivergentValue
from nemotrt.exporter.runtime.graph_file import OnnxGraph
from nemotrt.exporter.stages.trace import trace
from nemotrt.exporter.validation.parts.layerwise import part_noise, trials
from nemotrt.exporter.validation.parts.part_trial import (
    FLOAT,
    Beside,
    PartRun,
    PartRunner,
    PartTrial,
    error,
    limit,
)
from nemotrt.exporter.validation.parts.subgraphs import Cut
from nemotrt.exporter.validation.parts.torch_parts import PartModules, TracedTorchPart
from nemotrt.exporter.validation.plan import Workload
from nemotrt.exporter.validation.runners.onnx_part import PartSession
from nemotrt.plugins.contract import STEP_INPUTS, DType, PoolSpec

if TYPE_CHECKING:
    from onnx import ModelProto, NodeProto, TensorProto

OpenPart = Callable[[OnnxGraph], PartRunner]


def bisect(
    model: LoadedModel,
    config: BuildConfig,
    graph: OnnxGraph,
    workload: Workload,
    *,
    open_part: OpenPart = PartSession,
    advance: Advance = ignore,
) -> Bisection:
    """Where the graph departs over the steps of a mixed batch, part by part; `advance` hears of `num_steps`.

    `open_part` runs a part on the weights beside the graph: ONNX Runtime, or an engine that is built of it.
    """
    programs = _programs(model, config)
    pools, modules = model.pools(config), PartModules(model)
    advance(1)
    runs_as: list[str] = []
    changed: list[str] = []

    def trial(cut: Cut) -> PartTrial:
        program = programs[cut.place]
        inside = {name for node in cut.model.graph.node for name in node.output}
        names = [name for name in dict.fromkeys(program.names.values()) if name in inside]
        runner = _Marked(cut, names, changed, lambda part: open_part(OnnxGraph(part, graph.path)))
        runs_as.append(runner.runs_as)
        reference, baseline = program.parts(modules, cut, pools)
        return PartTrial(cut, runner, reference, baseline, part_noise(cut, pools, workload), names)

    kinds = {f"layers.{index}": kind for index, kind in model.config.numbered_layers.items()}
    diverging: list[DivergentValue] = []
    nearest: DivergentValue | None = None
    num_values = num_unmatched = 0
    for cut, done, _ in trials(config, graph, trial, workload):
        found = list(_suspects(cut, done, kinds.get(cut.place, cut.place)))
        num_values += len(found)
        num_unmatched += sum(len(node.output) for node in cut.model.graph.node) - len(found)
        diverging += _first_departing(cut, done, found, model, graph)
        nearest = max(
            (suspect for suspect in (nearest, *found) if suspect and not suspect.diverges),
            key=lambda suspect: suspect.limit_fraction,
            default=None,
        )
        del done
        advance(1)
    return Bisection(
        runs_as=max(runs_as, key=runs_as.count),
        num_values=num_values,
        num_unmatched=num_unmatched,
        diverging=tuple(diverging),
        nearest=nearest,
        marking_changed=tuple(dict.fromkeys(changed)),
    )


def num_steps(num_layers: int) -> int:
    """What `bisect` tells its `advance` of: tracing, and every part."""
    return 1 + num_layers + 2


@dataclasses.dataclass(frozen=True)
class _Program:
    """A part as it was traced in FP32 and at the graph's precision, if that is another."""

    wide: TracedPart
    half: TracedPart | None
    dtype: torch.dtype
    names: dict[str, str]
    """The programs' nodes → the graph's values."""

    def parts(
        self, modules: PartModules, cut: Cut, pools: Sequence[PoolSpec]
    ) -> tuple[TracedTorchPart, TracedTorchPart | None]:
        """PyTorch's part in FP32, and at the graph's precision if that is another."""

        def part(traced: TracedPart, dtype: torch.dtype) -> TracedTorchPart:
            return TracedTorchPart(modules, cut, pools, dtype, traced.program, self.names)

        return part(self.wide, torch.float32), part(self.half, self.dtype) if self.half else None


def _programs(model: LoadedModel, config: BuildConfig) -> dict[str, _Program]:
    """By the parts' places."""
    dtype = config.dtype.torch
    own = trace(model, config)
    is_wide = dtype == torch.float32
    wide = own if is_wide else trace(model, dataclasses.replace(config, precision="fp32", state_dtype="fp32"))
    found = {}
    for part, other, names in zip(own.parts, wide.parts, value_names(own), strict=True):
        if [node.name for node in part.program.graph.nodes] != [n.name for n in other.program.graph.nodes]:
            raise AssertionError(f"{part.prefix} is traced to other operators in FP32 than in {dtype}")
        found[part.prefix] = _Program(other, None if is_wide else part, dtype, names)
    return found


class _Marked:
    """A part with inner values as outputs, beside the same part without: the bits that both give must be the same."""

    def __init__(
        self,
        cut: Cut,
        names: Sequence[str],
        changed: list[str],
        open_part: Callable[[ModelProto], PartRunner],
    ) -> None:
        """The part's place is added to `changed` whenever they are not."""
        routers = [cut.router_logits] if cut.router_logits else []
        self._place, self._changed = cut.place, changed
        self._marked = open_part(cut.showing(dict.fromkeys([*routers, *names])))
        self._plain = open_part(cut.model)
        self.runs_as = self._marked.runs_as

    def run(self, feeds: Mapping[str, NDArray[Any]]) -> dict[str, NDArray[Any]]:
        """Every output, of the part with marks."""
        shown = self._marked.run(feeds)
        for name, values in self._plain.run(feeds).items():
            if not np.array_equal(values, shown[name], equal_nan=True):
                self._changed.append(self._place)
        return shown


def _suspects(cut: Cut, done: PartRun, kind: str) -> Iterator[DivergentValue]:
    """Every value that was compared, in the order in which nodes make them."""
    for node in cut.model.graph.node:
        for name in node.output:
            if name in done.shown:
                yield _suspect(cut, node, name, kind, done.shown[name], done.baseline.get(name))


def _suspect(
    cut: Cut, node: NodeProto, name: str, kind: str, shown: Beside, baseline: Beside | None
) -> DivergentValue:
    tensor = cut.types[name].type.tensor_type
    base = error(baseline) if baseline else None
    found = error(shown)
    step, index, ours, reference = shown.worst()
    return DivergentValue(
        place=cut.place,
        kind=kind,
        node=node.name,
        op=node.op_type,
        tensor=name,
        shape=tuple(size.dim_param or str(size.dim_value) for size in tensor.shape.dim),
        error=_finite(found),
        baseline=base if base is None else _finite(base),
        limit=limit(base, is_fp32=_is_fp32(cut, name)),
        step=step,
        index=index,
        candidate=_finite(ours),
        reference=_finite(reference),
        reads=(),
    )


def _first_departing(
    cut: Cut, done: PartRun, found: Sequence[DivergentValue], model: LoadedModel, graph: OnnxGraph
) -> list[DivergentValue]:
    """The value of the earliest step, and of the earliest node, that departs; none where none does."""
    beyond = [suspect for suspect in found if suspect.diverges]
    if not beyond:
        return []
    # What a state lost in one step shows in all that follow.
    first = min(beyond, key=lambda suspect: _first_step(suspect, done, cut))
    return [_explained(first, cut, found, done.shown[first.tensor].shapes, model, graph)]


def _first_step(suspect: DivergentValue, done: PartRun, cut: Cut) -> int:
    """After how many steps the value is beyond its limit."""
    shown, baseline = done.shown[suspect.tensor], done.baseline.get(suspect.tensor)
    is_fp32 = _is_fp32(cut, suspect.tensor)
    for count in range(1, len(shown.steps)):
        base = error(baseline.after(count)) if baseline else None
        if error(shown.after(count)) > limit(base, is_fp32=is_fp32):
            return count
    return len(shown.steps)


def _is_fp32(cut: Cut, name: str) -> bool:
    return cut.types[name].type.tensor_type.elem_type == FLOAT


def _finite(value: float) -> float | None:
    return value if np.isfinite(value) else None


def _explained(
    suspect: DivergentValue,
    cut: Cut,
    found: Sequence[DivergentValue],
    shapes: tuple[tuple[int, ...], tuple[int, ...]] | None,
    model: LoadedModel,
    graph: OnnxGraph,
) -> DivergentValue:
    """With what is known of each input of the value's node: the node, or one of these, is wrong."""
    node = next(node for node in cut.model.graph.node if node.name == suspect.node)
    known = {other.tensor: other for other in found}
    reads = [f"shape {list(shapes[0])}, PyTorch's is {list(shapes[1])}"] if shapes else []
    for name in dict.fromkeys(filter(None, node.input)):
        if name in cut.weights:
            said = _weight(cut.weights[name], model, graph.path.parent)
        elif name in known:
            said = f"agrees, {known[name].error:.3g} of {known[name].limit:.3g}"
        elif name in cut.pools:
            said = "the state, the same as PyTorch's at first"
        elif name == cut.flow_in or name in STEP_INPUTS:
            said = "given, the same as PyTorch's"
        else:
            said = "not compared: PyTorch has no such value"
        reads.append(f"{name}: {said}")
    return dataclasses.replace(suspect, reads=tuple(reads))


def _weight(tensor: TensorProto, model: LoadedModel, folder: Path) -> str:
    """Whether a weight holds the checkpoint's values."""
    source = model.weights.get(tensor.name)
    place = {entry.key: entry.value for entry in tensor.external_data}
    if source is None or not place:
        return "a constant of the graph"
    path, offset = folder / place["location"], int(place["offset"])
    if any(stored.path == path and stored.offset == offset for stored in source.tensors):
        return "the bundle's own weight, which PyTorch took too: --checkpoint compares it"
    dtype = DType.from_onnx(tensor.data_type)
    stored = np.memmap(path, np.uint8, "r", offset, int(place["length"]))
    position = differing = 0
    for piece in weights.values(source, tuple(tensor.dims), dtype):
        wanted = piece.view(torch.uint8).numpy()
        is_other = stored[position : position + len(wanted)] != wanted
        differing += int(is_other.reshape(-1, dtype.itemsize).any(1).sum())
        position += len(wanted)
    total = position // dtype.itemsize
    return (
        f"DIFFERS from the checkpoint in {differing:,} of {total:,} values"
        if differing
        else "the checkpoint's"
    )
