"""Bisect: name the first layer, op and value of a graph that diverge from PyTorch.

Each part of the graph runs alone on the reference's inputs, with every value inside it as an output. PyTorch's values
come from the traced program of the part, run operator by operator on the real weights: in FP32, as the reference, and
at the graph's precision, as the rounding baseline.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import torch
from numpy.typing import NDArray
from torch.export import ExportedProgram

from nemotrt.exporter.artifacts import TracedModel
from nemotrt.exporter.checkpoint import weights
from nemotrt.exporter.checkpoint.loaded_model import LoadedModel
from nemotrt.exporter.config import BuildConfig
from nemotrt.exporter.lowering.graph_writer import value_names
from nemotrt.exporter.progress import Advance, ignore
from nemotrt.exporter.report.model import Bisection, DivergentValue
from nemotrt.exporter.runtime.graph_file import OnnxGraph
from nemotrt.exporter.validation.parts.part_run import (
    PartComparison,
    PartRunner,
    PartRunners,
    error_limit,
    run_parts,
)
from nemotrt.exporter.validation.parts.subgraphs import GraphPart
from nemotrt.exporter.validation.parts.torch_parts import PartModules, TracedTorchPart
from nemotrt.exporter.validation.plan import Workload
from nemotrt.exporter.validation.runners.base import PartSession
from nemotrt.plugins.contract import STEP_INPUTS, DType

OpenPart = Callable[[OnnxGraph], PartRunner]
"""Loads a part of a graph in ONNX Runtime, or builds an engine from it."""


def bisect(
    model: LoadedModel,
    config: BuildConfig,
    graph: OnnxGraph,
    workload: Workload,
    traced: TracedModel,
    traced_fp32: TracedModel,
    *,
    open_part: OpenPart = PartSession,
    advance: Advance = ignore,
) -> Bisection:
    """The first value of each part that diverges over the steps of a mixed batch; calls `advance` after each part.

    The model is traced at the graph's precision and in FP32, which may be the same.
    """
    programs = _programs(traced, traced_fp32)
    modules, pools, dtype = PartModules(model), model.pools(config), DType(traced.dtype).torch
    runs_as: list[str] = []
    changed: dict[str, None] = {}

    def open_runners(part: GraphPart) -> PartRunners:
        program, program_fp32, names = programs[part.name]
        outputs = {value.name for node in part.model.graph for value in node.outputs}
        compared = [name for name in dict.fromkeys(names.values()) if name in outputs]
        runner = _MarkedPart(part, compared, changed, open_part)
        runs_as.append(runner.runs_as)
        reference = TracedTorchPart(modules, part, pools, torch.float32, program_fp32, names)
        if dtype == torch.float32:
            return runner, reference, None, compared
        return runner, reference, TracedTorchPart(modules, part, pools, dtype, program, names), compared

    kinds = {f"layers.{index}": kind for index, kind in model.config.numbered_layers.items()}
    diverging: list[DivergentValue] = []
    near: list[DivergentValue] = []
    num_values = num_unmatched = 0
    for part, comparison in run_parts(model, config, graph, workload, open_runners):
        values = list(_values(part, comparison, kinds.get(part.name, part.name)))
        num_values += len(values)
        num_unmatched += sum(len(node.outputs) for node in part.model.graph) - len(values)
        if beyond := [value for value in values if value.diverges]:
            # The step comes first: an error in a state shows at earlier nodes of every later step.
            first = min(beyond, key=partial(_first_step, comparison=comparison, part=part))
            diverging.append(_with_inputs(first, part, values, comparison, model))
        near += [value for value in values if not value.diverges]
        del comparison
        advance(1)
    return Bisection(
        runs_as=max(runs_as, key=runs_as.count),
        num_values=num_values,
        num_unmatched=num_unmatched,
        diverging=tuple(diverging),
        nearest=max(near, key=lambda value: value.limit_fraction, default=None),
        marking_changed=tuple(changed),
    )


def _programs(
    traced: TracedModel, traced_fp32: TracedModel
) -> dict[str, tuple[ExportedProgram, ExportedProgram, dict[str, str]]]:
    """For each part: its program, its FP32 program, and the names of their nodes → the names of the graph's values."""
    programs = {}
    for part, part_fp32, names in zip(traced.parts, traced_fp32.parts, value_names(traced), strict=True):
        program, program_fp32 = part.program, part_fp32.program
        if [node.name for node in program.graph.nodes] != [node.name for node in program_fp32.graph.nodes]:
            raise AssertionError(f"{part.prefix} has other operators in FP32 than in {traced.dtype}")
        programs[part.prefix] = program, program_fp32, names
    return programs


class _MarkedPart:
    """A part with inner values as outputs, which runs next to the same part without them.

    More outputs may change what a runtime fuses; `changed` gets the part's name if the common outputs ever differ.
    """

    def __init__(
        self, part: GraphPart, names: Sequence[str], changed: dict[str, None], open_part: OpenPart
    ) -> None:
        self._name, self._changed = part.name, changed
        self._marked = open_part(part.graph((*part.router_logits, *names)))
        self._plain = open_part(part.graph())
        self.runs_as = self._marked.runs_as

    def run(self, feeds: Mapping[str, NDArray[Any]]) -> dict[str, NDArray[Any]]:
        """Every output of the part with inner values."""
        results = self._marked.run(feeds)
        for name, values in self._plain.run(feeds).items():
            if not np.array_equal(values, results[name], equal_nan=True):
                self._changed[self._name] = None
        return results


def _values(part: GraphPart, comparison: PartComparison, kind: str) -> Iterator[DivergentValue]:
    """Every compared value, in the order of the nodes."""
    for node in part.model.graph:
        for name in (str(value.name) for value in node.outputs):
            if name not in comparison.candidate:
                continue
            candidate = comparison.candidate[name]
            baseline = comparison.baseline[name].error if name in comparison.baseline else None
            step, index, ours, reference = candidate.worst()
            yield DivergentValue(
                place=part.name,
                kind=kind,
                node=str(node.name),
                op=node.op_type,
                tensor=name,
                shape=part.axes(name),
                error=_finite(candidate.error),
                baseline=baseline if baseline is None else _finite(baseline),
                limit=error_limit(baseline, is_fp32=part.is_fp32(name)),
                step=step,
                index=index,
                candidate=_finite(ours),
                reference=_finite(reference),
                reads=(),
            )


def _finite(value: float) -> float | None:
    return value if np.isfinite(value) else None


def _first_step(value: DivergentValue, comparison: PartComparison, part: GraphPart) -> int:
    """The number of steps after which the value exceeds its limit."""
    candidate, baseline = comparison.candidate[value.tensor], comparison.baseline.get(value.tensor)
    is_fp32 = part.is_fp32(value.tensor)
    for count in range(1, len(candidate.steps)):
        base = baseline.first(count).error if baseline else None
        if candidate.first(count).error > error_limit(base, is_fp32=is_fp32):
            return count
    return len(candidate.steps)


def _with_inputs(
    value: DivergentValue,
    part: GraphPart,
    values: Sequence[DivergentValue],
    comparison: PartComparison,
    model: LoadedModel,
) -> DivergentValue:
    """The value with a line about each input of its node: either the node is wrong, or one of its inputs."""
    node = next(node for node in part.model.graph if node.name == value.node)
    compared = {other.tensor: other for other in values}
    shapes = comparison.candidate[value.tensor].shapes
    lines = [f"shape {list(shapes[0])}, PyTorch's is {list(shapes[1])}"] if shapes else []
    for name in dict.fromkeys(str(given.name) for given in node.inputs if given):
        tensor = part.values[name].const_value
        if tensor is not None:
            line = _compare_weight(name, tensor, model)
        elif name in compared:
            line = f"agrees, {compared[name].error:.3g} of {compared[name].limit:.3g}"
        elif name in part.pools:
            line = "the state, initially equal to PyTorch's"
        elif name == part.flow_in or name in STEP_INPUTS:
            line = "an input, equal to PyTorch's"
        else:
            line = "not compared: PyTorch has no such value"
        lines.append(f"{name}: {line}")
    return replace(value, reads=tuple(lines))


def _compare_weight(name: str, tensor: ir.TensorProtocol, model: LoadedModel) -> str:
    """Whether a weight is equal to the checkpoint's, in words."""
    source = model.weights.get(name)
    if source is None or not isinstance(tensor, ir.ExternalTensor):
        return "a constant of the graph"
    path, offset = Path(tensor.path), tensor.offset or 0
    if any(stored.path == path and stored.offset == offset for stored in source.tensors):
        return "the bundle's own weight, which PyTorch used too; --checkpoint compares it"
    dtype = DType.lookup("onnx", tensor.dtype)
    ours = np.memmap(path, np.uint8, "r", offset, tensor.nbytes)
    position = num_differing = 0
    for piece in weights.values(source, tuple(map(int, tensor.shape.numpy())), dtype):
        theirs = piece.view(torch.uint8).numpy()
        differs = ours[position : position + len(theirs)] != theirs
        num_differing += int(differs.reshape(-1, dtype.itemsize).any(1).sum())
        position += len(theirs)
    if not num_differing:
        return "equal to the checkpoint's"
    return f"DIFFERS from the checkpoint in {num_differing:,} of {position // dtype.itemsize:,} values"
