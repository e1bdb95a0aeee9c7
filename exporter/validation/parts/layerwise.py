"""Each part of the graph alone, on the reference's inputs, so that an error stays in the layer that made it.

Only one part is in memory at a time, in PyTorch (FP32, and the graph's precision for the rounding baseline) and in
ONNX Runtime, so that a model that does not fit as a whole is still compared layer by layer.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import numpy as np
import torch
from torch import Tensor

from nemotrt.exporter.checkpoint.loaded_model import LoadedModel
from nemotrt.exporter.config import BuildConfig
from nemotrt.exporter.progress import Advance, ignore
from nemotrt.exporter.report.model import Gate, PartError
from nemotrt.exporter.runtime.graph_file import OnnxGraph
from nemotrt.exporter.runtime.step import StepInputs
from nemotrt.exporter.validation import metrics
from nemotrt.exporter.validation.gates import BASELINE_FACTOR, FP32_RELATIVE_L2, Pair, layer_gates
from nemotrt.exporter.validation.parts.opwise import compare_ops
from nemotrt.exporter.validation.parts.part_run import PartComparison, PartRunner, ValueComparison, run_part
from nemotrt.exporter.validation.parts.subgraphs import GraphPart, split
from nemotrt.exporter.validation.parts.torch_parts import PartModules, TorchPart
from nemotrt.exporter.validation.plan import Workload
from nemotrt.exporter.validation.runners.onnx_part import PartSession
from nemotrt.exporter.validation.scenarios import MIXED, scenarios
from nemotrt.plugins.contract import NEXT

OpenRunners = Callable[[GraphPart], tuple[PartRunner, TorchPart, TorchPart | None, Sequence[str]]]
"""From a part: its runner, the reference, the rounding baseline if the graph is not FP32, and the compared values."""


def compare_parts(
    model: LoadedModel,
    config: BuildConfig,
    graph: OnnxGraph,
    workload: Workload,
    *,
    advance: Advance = ignore,
) -> tuple[tuple[Gate, ...], tuple[PartError, ...], tuple[PartError, ...]]:
    """The gates, the errors of layers and the errors of ops, each part and each op alone over a mixed batch.

    Calls `advance` after each part.
    """
    dtype = config.dtype.torch
    modules, pools = PartModules(model), model.pools(config)

    def open_runners(part: GraphPart) -> tuple[PartSession, TorchPart, TorchPart | None, Sequence[str]]:
        reference = TorchPart(modules, part, pools, torch.float32)
        baseline = TorchPart(modules, part, pools, dtype) if dtype != torch.float32 else None
        return PartSession(part.graph(part.router_logits)), reference, baseline, part.outputs

    kinds = {f"layers.{index}": kind for index, kind in model.config.numbered_layers.items()}
    gates: list[Gate] = []
    layers: list[PartError] = []
    ops: list[PartError] = []
    counts = [int(inputs.query_start[-1]) for inputs in mixed_steps(workload)]
    for part, comparison in run_parts(model, config, graph, workload, open_runners):
        candidate, baseline = _pairs(part, comparison)
        gates += layer_gates(part.name, candidate, baseline)
        if part.addend:
            layers.append(_layer_error(part.name, kinds[part.name], candidate, baseline))
        op_gates, op_errors = compare_ops(part, comparison.calls, counts)
        gates += op_gates
        ops += op_errors
        del comparison
        advance(1)
    return tuple(gates), tuple(layers), tuple(ops)


def run_parts(
    model: LoadedModel, config: BuildConfig, graph: OnnxGraph, workload: Workload, open_runners: OpenRunners
) -> Iterator[tuple[GraphPart, PartComparison]]:
    """Every part and its comparison; what flows into a part is what flows out of the reference's part before."""
    steps = mixed_steps(workload)
    dtype, pools = config.dtype.torch, model.pools(config)
    flows: list[Tensor] = [torch.from_numpy(inputs.input_ids) for inputs in steps]
    for part in split(graph):
        noise = workload.noise(pool for pool in pools if pool.name in part.pools)
        # Rounding what flows in lets all three runners start from the same bits.
        rounded = [flow if flow.dtype == torch.int64 else flow.to(dtype) for flow in flows]
        # No name here may hold a runner: its weights would stay in memory next to those of the following part.
        flows, comparison = run_part(part, noise, list(zip(rounded, steps, strict=True)), *open_runners(part))
        yield part, comparison
        del comparison


def mixed_steps(workload: Workload) -> tuple[StepInputs, ...]:
    """The steps that every part runs alone: the mixed batch, on random tokens."""
    tokens = workload.random_tokens(workload.prompt + workload.decode)
    return scenarios(tokens[: workload.prompt], tokens[workload.prompt :], workload.page_size)[MIXED]


def _pairs(part: GraphPart, comparison: PartComparison) -> tuple[dict[str, Pair], dict[str, Pair] | None]:
    """The candidate's values and the baseline's, under the names that gates give them."""
    labels = {part.flow_out: "", part.addend: "adds"}

    def labeled(values: dict[str, ValueComparison]) -> dict[str, Pair]:
        return {labels.get(name, name.removeprefix(NEXT)): value.pair for name, value in values.items()}

    return labeled(comparison.candidate), labeled(comparison.baseline) or None


def _layer_error(
    name: str, kind: str, candidate: dict[str, Pair], baseline: dict[str, Pair] | None
) -> PartError:
    pair = candidate["adds"]
    error, not_finite = metrics.relative_l2(*pair), int(np.count_nonzero(~np.isfinite(pair[0])))
    base = metrics.relative_l2(*baseline["adds"]) if baseline else None
    limit = FP32_RELATIVE_L2 if base is None else BASELINE_FACTOR * base
    return PartError(name, kind, "", error if np.isfinite(error) else None, not_finite, base, limit)
