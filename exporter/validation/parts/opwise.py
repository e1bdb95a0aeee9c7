"""Each node of our ops alone, on the reference's inputs of that node, rounded to the graph's dtypes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import onnx_ir as ir
from torch import Tensor

from nemotrt.exporter.report.model import Gate, Metric, PartError
from nemotrt.exporter.validation.parts.part_run import ValueComparison, as_array, error_limit, written_rows
from nemotrt.exporter.validation.parts.subgraphs import GraphPart
from nemotrt.exporter.validation.parts.torch_parts import OpCall
from nemotrt.exporter.validation.runners.onnx_part import PartSession

ALONE = "each op alone"
"""The scenario in which every op runs on inputs that are bitwise equal."""


def compare_ops(
    part: GraphPart, calls: Sequence[tuple[Sequence[OpCall], Sequence[OpCall]]], counts: Sequence[int]
) -> tuple[list[Gate], list[PartError]]:
    """The gates and the errors of every output of every op of the part.

    For each step, `calls` holds the ops that the reference and the baseline called, and `counts` the tokens.
    """
    errors: list[PartError] = []
    for position, node in enumerate(part.ops):
        node_calls = [(reference[position], baseline[position]) for reference, baseline in calls]
        errors += _compare(part, node, node_calls, counts)
    return [_gate(error) for error in errors], errors


def _gate(error: PartError) -> Gate:
    name = f"{error.name} {error.output}"
    if error.error is None:
        return Gate(ALONE, name, Metric.NOT_FINITE, float(error.not_finite), 0.0)
    return Gate(ALONE, name, Metric.RELATIVE_L2, error.error, error.limit, error.baseline)


def _compare(
    part: GraphPart, node: ir.Node, calls: Sequence[tuple[OpCall, OpCall]], counts: Sequence[int]
) -> list[PartError]:
    spec = calls[0][0].spec
    if spec.name != node.op_type:
        raise AssertionError(f"{node.name} is {node.op_type}, but PyTorch called {spec.name} in its place")
    session = PartSession(part.op_graph(node))
    names = [str(value.name) for value in node.inputs if value]
    is_weight = [part.is_weight(name) for name in names]
    is_fp32_graph = calls[0][0].tensors[0].dtype == calls[0][1].tensors[0].dtype
    comparisons = [(ValueComparison(), ValueComparison()) for _ in spec.outputs]
    for (reference, baseline), count in zip(calls, counts, strict=True):
        inputs = list(map(_inputs, reference.tensors, baseline.tensors, is_weight))
        ours = session.run({name: _fed(rounded) for name, (_, rounded) in zip(names, inputs, strict=True)})
        # Nothing is rounded in FP32, so the reference has already computed the results of these inputs.
        expected = at_precision = reference.results
        if not is_fp32_graph:
            expected = spec.reference()(*(wide for wide, _ in inputs), **reference.attributes)
            at_precision = spec.reference()(*(rounded for _, rounded in inputs), **reference.attributes)
        for i, (candidate, rounding) in enumerate(comparisons):
            values = as_array(expected[i])
            rows: Any = slice(count)
            if i in spec.pools:
                source = spec.pools[i]
                rows = written_rows(names[source], values, as_array(inputs[source][0]))
            candidate.add(as_array(ours[str(node.outputs[i].name)]), values, rows)
            rounding.add(as_array(at_precision[i]), values, rows)
    errors = []
    for i, (candidate, rounding) in enumerate(comparisons):
        base = None if is_fp32_graph else rounding.error
        not_finite = int(np.count_nonzero(~np.isfinite(candidate.pair[0])))
        errors.append(
            PartError(
                name=str(node.name),
                kind=node.op_type,
                output=spec.outputs[i].name,
                error=None if not_finite else candidate.error,
                not_finite=not_finite,
                baseline=base,
                limit=error_limit(base, is_fp32=part.is_fp32(str(node.outputs[i].name))),
            )
        )
    return errors


def _inputs(reference: Tensor, baseline: Tensor, is_weight: bool) -> tuple[Tensor, Tensor]:
    """An op's input for the reference, and at the graph's precision: equal bitwise unless it is a weight."""
    if is_weight:
        return reference, baseline
    rounded = reference.to(baseline.dtype)
    return rounded.to(reference.dtype), rounded


def _fed(values: Tensor) -> Any:
    return (values.float() if values.is_floating_point() else values).numpy()
