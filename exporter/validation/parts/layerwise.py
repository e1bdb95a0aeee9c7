"""Each part of the graph alone, on the reference's inputs, so that an error stays in the layer that made it.

Only one part is in memory at a time, in PyTorch (FP32, and the graph's precision for the rounding baseline) and in
ONNX Runtime, so that a model that does not fit as a whole is still compared layer by layer.
"""

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import onnx_ir as ir
import torch
from numpy.typing import NDArray
from torch import Tensor

from nemotrt.exporter.checkpoint.loaded_model import LoadedModel
from nemotrt.exporter.config import BuildConfig
from nemotrt.exporter.progress import Advance, ignore
from nemotrt.exporter.report.model import Gate, Metric, PartError
from nemotrt.exporter.runtime.graph_file import OnnxGraph
from nemotrt.exporter.validation import metrics
from nemotrt.exporter.validation.envelope import Envelope
from nemotrt.exporter.validation.gates import (
    ALONE,
    ALONE_AT_LIMITS,
    BASELINE_FACTOR,
    FP32_RELATIVE_L2,
    Pair,
    layer_gates,
    router_gate,
)
from nemotrt.exporter.validation.parts.part_run import (
    PartComparison,
    PartRunners,
    StepCalls,
    ValueComparison,
    as_array,
    error_limit,
    run_parts,
)
from nemotrt.exporter.validation.parts.subgraphs import GraphPart
from nemotrt.exporter.validation.parts.torch_parts import PartModules, TorchPart
from nemotrt.exporter.validation.plan import Workload
from nemotrt.exporter.validation.runners.base import PartSession
from nemotrt.plugins.contract import NEXT

OPS_ALONE = "each op alone"
"""The scenario in which every op runs on inputs that are bitwise equal."""


def compare_parts(
    model: LoadedModel,
    config: BuildConfig,
    graph: OnnxGraph,
    workload: Workload,
    envelope: Envelope,
    *,
    advance: Advance = ignore,
) -> tuple[tuple[Gate, ...], tuple[PartError, ...], tuple[PartError, ...]]:
    """The gates, the errors of layers and the errors of ops, each part and each op alone over a mixed batch.

    The first part of each form also runs at the limits of the envelope. Calls `advance` after each part.
    """
    dtype = config.dtype.torch
    modules, pools = PartModules(model), model.pools(config)

    def open_runners(part: GraphPart) -> PartRunners:
        reference = TorchPart(modules, part, pools, torch.float32)
        baseline = TorchPart(modules, part, pools, dtype) if dtype != torch.float32 else None
        return PartSession(part.graph_with_forced_routing()), reference, baseline, part.outputs

    kinds = {f"layers.{index}": kind for index, kind in model.config.numbered_layers.items()}
    gates: list[Gate] = []
    layers: list[PartError] = []
    ops: list[PartError] = []
    for part, comparison in run_parts(model, config, graph, workload, open_runners, envelope):
        if comparison.at_limits:
            gates += _part_gates(ALONE_AT_LIMITS, part, comparison.at_limits)
            comparison.at_limits = None
        gates += _part_gates(ALONE, part, comparison)
        if part.addend:
            layers.append(_layer_error(part, kinds[part.name], comparison))
        for position, node in enumerate(part.ops):
            errors = list(_op_errors(part, node, position, comparison.calls))
            gates += map(_op_gate, errors)
            ops += errors
        del comparison
        advance(1)
    return tuple(gates), tuple(layers), tuple(ops)


def _part_gates(scenario: str, part: GraphPart, comparison: PartComparison) -> list[Gate]:
    candidate, baseline = (_labeled(part, values) for values in (comparison.candidate, comparison.baseline))
    gates = layer_gates(scenario, part.name, candidate, baseline, comparison.out_of_bounds)
    if comparison.router_errors:
        error, base = np.max(comparison.router_errors, axis=0).tolist()
        gates.append(router_gate(scenario, f"{part.name} router", error, base if baseline else None))
    return gates


def _labeled(part: GraphPart, values: dict[str, ValueComparison]) -> dict[str, Pair]:
    """The values under the names that gates give them."""
    labels = {part.flow_out: "", part.addend: "adds"}
    return {labels.get(name, name.removeprefix(NEXT)): value.pair for name, value in values.items()}


def _layer_error(part: GraphPart, kind: str, comparison: PartComparison) -> PartError:
    """The error of what a layer adds to its input."""
    pair = comparison.candidate[part.addend].pair
    error, not_finite = metrics.relative_l2(*pair), int(np.count_nonzero(~np.isfinite(pair[0])))
    base = metrics.relative_l2(*comparison.baseline[part.addend].pair) if comparison.baseline else None
    limit = FP32_RELATIVE_L2 if base is None else BASELINE_FACTOR * base
    return PartError(part.name, kind, "", error if np.isfinite(error) else None, not_finite, base, limit)


def _op_gate(error: PartError) -> Gate:
    name = f"{error.name} {error.output}"
    if error.error is None:
        return Gate(OPS_ALONE, name, Metric.NOT_FINITE, float(error.not_finite), 0.0)
    return Gate(OPS_ALONE, name, Metric.RELATIVE_L2, error.error, error.limit, error.baseline)


def _op_errors(
    part: GraphPart, node: ir.Node, position: int, calls: Sequence[StepCalls]
) -> Iterator[PartError]:
    """The error of every output of the op at this position of the part."""
    spec = calls[0][0][position].spec
    if spec.name != node.op_type:
        raise AssertionError(f"{node.name} is {node.op_type}, but PyTorch called {spec.name} in its place")
    session = PartSession(part.op_graph(node))
    names = [str(value.name) for value in node.inputs if value]
    is_weight = [part.values[name].is_initializer() for name in names]
    is_fp32_graph = len({side[position].tensors[0].dtype for side in calls[0][:2]}) == 1
    comparisons = [(ValueComparison(), ValueComparison()) for _ in spec.outputs]
    for reference_calls, baseline_calls, count in calls:
        reference, baseline = reference_calls[position], baseline_calls[position]
        inputs = list(map(_inputs, reference.tensors, baseline.tensors, is_weight))
        ours = _results(session, names, inputs)
        # Nothing is rounded in FP32, so the reference has already computed the results of these inputs.
        expected = at_precision = reference.results
        if not is_fp32_graph:
            expected = spec.reference()(*(wide for wide, _ in inputs), **reference.attributes)
            at_precision = spec.reference()(*(rounded for _, rounded in inputs), **reference.attributes)
        for i, (candidate, rounding) in enumerate(comparisons):
            rows: Any = slice(count)
            if i in spec.pools:
                source = spec.pools[i]
                rows = _written_rows(names[source], expected[i], inputs[source][0])
            candidate.add(ours.get(str(node.outputs[i].name), np.zeros(0)), expected[i], rows)
            rounding.add(at_precision[i], expected[i], rows)
    for i, (candidate, rounding) in enumerate(comparisons):
        base = None if is_fp32_graph else rounding.error
        not_finite = int(np.count_nonzero(~np.isfinite(candidate.pair[0])))
        yield PartError(
            name=str(node.name),
            kind=node.op_type,
            output=spec.outputs[i].name,
            error=None if not_finite else candidate.error,
            not_finite=not_finite,
            baseline=base,
            limit=error_limit(base, is_fp32=part.is_fp32(str(node.outputs[i].name))),
        )


def _written_rows(pool: str, after: Tensor, before: Tensor) -> NDArray[np.bool_]:
    """The elements of a pool that an op wrote: whole slots, and whole positions of pages, without the scratch row.

    Values are not compared one by one: of a large model's hundred million, some equal their noise by chance.
    """
    within = (1, 2, 4) if pool.startswith("kv_cache.") else tuple(range(1, after.ndim))
    written = (as_array(after) != as_array(before)).any(axis=within, keepdims=True)
    written[0] = False
    return np.broadcast_to(written, after.shape)


def _results(
    session: PartSession, names: Sequence[str], inputs: Sequence[tuple[Tensor, Tensor]]
) -> dict[str, Any]:
    """An op's outputs for the rounded inputs; none, so that all count as not finite, if it takes other shapes.

    Weights are fed in FP32, which takes twice the memory of a layer's experts until this returns.
    """
    feeds = {name: _fed(rounded) for name, (_, rounded) in zip(names, inputs, strict=True)}
    return session.run(feeds) if session.accepts(feeds) else {}


def _inputs(reference: Tensor, baseline: Tensor, is_weight: bool) -> tuple[Tensor, Tensor]:
    """An op's input for the reference, and at the graph's precision: equal bitwise unless it is a weight."""
    if is_weight:
        return reference, baseline
    rounded = reference.to(baseline.dtype)
    return rounded.to(reference.dtype), rounded


def _fed(values: Tensor) -> Any:
    return (values.float() if values.is_floating_point() else values).numpy()
