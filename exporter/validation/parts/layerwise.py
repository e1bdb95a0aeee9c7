"""Each part of the graph alone, on the reference's own inputs: an error stays on the layer that made it.

One part is in memory at a time, in PyTorch (FP32, and at the graph's precision for the baseline) and in ONNX Runtime,
with the activations of the steps: a model that fits no machine as a whole is still compared layer by layer.

Legend: T tokens, D hidden size.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from nemotrt.exporter.checkpoint.loaded_model import LoadedModel
from nemotrt.exporter.config import BuildConfig
from nemotrt.exporter.progress import Advance, ignore
from nemotrt.exporter.report.model import Gate, PartError
from nemotrt.exporter.runtime.graph_file import OnnxGraph
from nemotrt.exporter.runtime.step import StepInputs
from nemotrt.exporter.validation import gates as judged
from nemotrt.exporter.validation import metrics
from nemotrt.exporter.validation.gates import Noise
from nemotrt.exporter.validation.parts import opwise
from nemotrt.exporter.validation.parts.part_trial import Compared, PartRun, PartTrial
from nemotrt.exporter.validation.parts.subgraphs import Cut, cuts
from nemotrt.exporter.validation.parts.torch_parts import PartModules, TorchPart
from nemotrt.exporter.validation.plan import Workload
from nemotrt.exporter.validation.runners.onnx_part import PartSession
from nemotrt.exporter.validation.scenarios import MIXED, scenarios
from nemotrt.plugins.contract import PoolSpec


@dataclass(frozen=True)
class Parts:
    """What the parts alone showed: gates, each layer's error, and each op's."""

    gates: tuple[Gate, ...] = ()
    layers: tuple[PartError, ...] = ()
    ops: tuple[PartError, ...] = ()
    runs_as: str = ""
    """How ONNX Runtime ran the graph, in words."""


MakeTrial = Callable[[Cut], PartTrial]


def compare_parts(
    model: LoadedModel,
    config: BuildConfig,
    graph: OnnxGraph,
    workload: Workload,
    *,
    advance: Advance = ignore,
) -> Parts:
    """Every part alone over the steps of a mixed batch, and in it every op alone; `advance` hears of parts."""
    dtype = config.dtype.torch
    pools, modules = model.pools(config), PartModules(model)

    runs_as: list[str] = []

    def trial(cut: Cut) -> PartTrial:
        shown = cut.showing([cut.router_logits] if cut.router_logits else [])
        reference = TorchPart(modules, cut, pools, torch.float32)
        session = PartSession(OnnxGraph(shown, graph.path))
        runs_as.append(session.runs_as)
        baseline = TorchPart(modules, cut, pools, dtype) if dtype != torch.float32 else None
        noise = part_noise(cut, pools, workload)
        return PartTrial(cut, session, reference, baseline, noise, cut.edges)

    kinds = {f"layers.{index}": kind for index, kind in model.config.numbered_layers.items()}
    gates: list[Gate] = []
    layers: list[PartError] = []
    ops: list[PartError] = []
    for cut, done, counts in trials(config, graph, trial, workload):
        shown, baseline = _labelled(cut, done.shown), _labelled(cut, done.baseline) or None
        gates += judged.layer_gates(cut.place, shown, baseline)
        if cut.mixed:
            layers.append(_layer_error(cut.place, kinds[cut.place], shown["adds"], baseline))
        op_gates, errors = opwise.compare_ops(cut, graph, done.calls, counts)
        gates += op_gates
        ops += errors
        del done
        advance(1)
    return Parts(tuple(gates), tuple(layers), tuple(ops), max(runs_as, key=runs_as.count))


def _layer_error(
    place: str, kind: str, pair: judged.Pair, baseline: dict[str, judged.Pair] | None
) -> PartError:
    error, broken = metrics.relative_l2(*pair), int(np.count_nonzero(~np.isfinite(pair[0])))
    base = metrics.relative_l2(*baseline["adds"]) if baseline else None
    limit = judged.FP32_RELATIVE_L2 if base is None else judged.BASELINE_FACTOR * base
    return PartError(place, kind, "", error if np.isfinite(error) else None, broken, base, limit)


def mixed_steps(workload: Workload) -> tuple[StepInputs, ...]:
    """The steps that every part runs alone: the mixed batch, on random tokens."""
    tokens = workload.random_tokens(workload.prompt + workload.decode)
    return scenarios(tokens[: workload.prompt], tokens[workload.prompt :], workload.page_size)[MIXED]


def part_noise(cut: Cut, pools: Sequence[PoolSpec], workload: Workload) -> Noise:
    """What a part's pools hold at first."""
    return workload.noise(pool for pool in pools if pool.name in cut.pools)


def trials(
    config: BuildConfig, graph: OnnxGraph, trial: MakeTrial, workload: Workload
) -> Iterator[tuple[Cut, PartRun, list[int]]]:
    """What every part gave, and how many tokens each had; what flows in is what the reference gave before it."""
    steps = mixed_steps(workload)
    counts = [int(inputs.query_start[-1]) for inputs in steps]
    dtype = config.dtype.torch
    flows: list[Tensor] = [torch.from_numpy(inputs.input_ids) for inputs in steps]
    for cut in cuts(graph.proto):
        running = trial(cut)
        # What flows is rounded, so that all three start from the same bits.
        flows = [
            running.step(flow if flow.dtype == torch.int64 else flow.to(dtype), inputs)
            for flow, inputs in zip(flows, steps, strict=True)
        ]
        found = running.found
        # Neither its weights nor its ops' are to be in memory beside those of what comes next.
        del running
        yield cut, found, counts
        del found


def _labelled(cut: Cut, compared: Compared) -> dict[str, judged.Pair]:
    """By what a value is to its part: nothing for what flows on, `adds`, or a pool's name."""
    labels = {cut.flow_out: "", cut.mixed: "adds"}
    return {labels.get(name, name.removeprefix("next.")): beside.pair for name, beside in compared.items()}
