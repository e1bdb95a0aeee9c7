"""Each of our ops' nodes alone, on the reference's own inputs of that node, rounded to what the graph holds them in."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from torch import Tensor

from nemotrt.exporter.report.model import Gate, Metric, PartError
from nemotrt.exporter.runtime.graph_file import OnnxGraph
from nemotrt.exporter.validation.parts.part_trial import FLOAT, Beside, as_array, error, limit, written
from nemotrt.exporter.validation.parts.subgraphs import Cut
from nemotrt.exporter.validation.parts.torch_parts import OpCall
from nemotrt.exporter.validation.runners.onnx_part import PartSession

if TYPE_CHECKING:
    from onnx import NodeProto

ALONE = "each op alone"
"""The scenario in which every op runs on inputs that are the same to the bit."""


def compare_ops(
    cut: Cut,
    graph: OnnxGraph,
    calls: Sequence[tuple[Sequence[OpCall], Sequence[OpCall]]],
    counts: Sequence[int],
) -> tuple[list[Gate], list[PartError]]:
    """Every output of every op of the part over the steps: its gates, and its error.

    `calls` are those that PartTrial keeps, `counts` the tokens of each step.
    """
    gates: list[Gate] = []
    errors: list[PartError] = []
    for position, node in enumerate(cut.ops):
        own = [(reference[position], baseline[position]) for reference, baseline in calls]
        for found in _compare(cut, node, graph, own, counts):
            errors.append(found)
            gates += _gates(found)
    return gates, errors


def _gates(found: PartError) -> list[Gate]:
    name = f"{found.name} {found.output}"
    if found.error is None:
        return [Gate(ALONE, name, Metric.NOT_FINITE, float(found.not_finite), 0.0)]
    return [Gate(ALONE, name, Metric.RELATIVE_L2, found.error, found.limit, found.baseline)]


def _compare(
    cut: Cut, node: NodeProto, graph: OnnxGraph, calls: Sequence[tuple[OpCall, OpCall]], counts: Sequence[int]
) -> list[PartError]:
    spec = calls[0][0].spec
    if spec.name != node.op_type:
        raise AssertionError(f"{node.name} is {node.op_type}, and PyTorch called {spec.name} in its place")
    session = PartSession(OnnxGraph(cut.only(node), graph.path))
    shown = [Beside() for _ in spec.outputs]
    baselines = [Beside() for _ in spec.outputs]
    for (reference, baseline), count in zip(calls, counts, strict=True):
        given = [
            _given(theirs, mine, is_weight=name in cut.weights)
            for name, theirs, mine in zip(node.input, reference.tensors, baseline.tensors, strict=True)
        ]
        fed = dict(zip(node.input, given, strict=True))
        ours = session.run({name: _fed(mine) for name, (_, mine) in fed.items() if name not in cut.weights})
        expected = spec.reference()(*(theirs for theirs, _ in given), **reference.attributes)
        at_precision = spec.reference()(*(mine for _, mine in given), **reference.attributes)
        for i, output in enumerate(node.output):
            whole = as_array(expected[i])
            rows: Any = slice(count)
            if i in spec.pools:
                source = spec.pools[i]
                rows = written(node.input[source], whole, as_array(given[source][0]))
            shown[i].add(as_array(ours[output]), whole, rows)
            baselines[i].add(as_array(at_precision[i]), whole, rows)
    is_half = calls[0][0].tensors[0].dtype != calls[0][1].tensors[0].dtype
    found = []
    for i, output in enumerate(spec.outputs):
        base = error(baselines[i]) if is_half else None
        is_fp32 = cut.types[node.output[i]].type.tensor_type.elem_type == FLOAT
        broken = int(np.count_nonzero(~np.isfinite(shown[i].pair[0])))
        found.append(
            PartError(
                name=node.name,
                kind=node.op_type,
                output=output.name,
                error=None if broken else error(shown[i]),
                not_finite=broken,
                baseline=base,
                limit=limit(base, is_fp32=is_fp32),
            )
        )
    return found


def _given(reference: Tensor, baseline: Tensor, *, is_weight: bool) -> tuple[Tensor, Tensor]:
    """An input as the reference gets it, and as the op at the graph's precision: the same bits but for weights."""
    if is_weight:
        return reference, baseline
    rounded = reference.to(baseline.dtype)
    return rounded.to(reference.dtype), rounded


def _fed(values: Tensor) -> Any:
    return (values.float() if values.is_floating_point() else values).numpy()
