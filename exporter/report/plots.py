"""Where everything of a report's plots stands, in the units of their SVG: the template only draws.

Lengths are of a picture 720 wide and 240 high, which the page scales to its width.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from nemotrt.exporter.report.model import Drift, Metric, NextToken, PartError, TextComparison, WorstToken
from nemotrt.exporter.report.precision_map import PlacePrecision

WIDTH, HEIGHT = 720, 240
LEFT, RIGHT, TOP, BOTTOM = 52, 8, 10, 30
SMALLEST = 1e-12
"""What a logarithmic axis shows of zero."""
MAX_LABELS = 20
"""Of layers below a plot."""
ROW, ROW_LABEL = 18, 176
"""Of the precision map: a row's height, and the room for what it is."""


@dataclass(frozen=True)
class LogAxis:
    """A logarithmic axis from one power of ten to another."""

    low: int
    high: int

    @classmethod
    def of(cls, values: Iterable[float]) -> LogAxis:
        """What shows all values that are not zero."""
        powers = [math.log10(max(v, SMALLEST)) for v in values if 0 < v < math.inf] or [-1.0, 0.0]
        low = math.floor(min(powers))
        return cls(low, max(math.ceil(max(powers)), low + 1))

    def y(self, value: float) -> float:
        """Where a value stands, from the top."""
        if not math.isfinite(value):
            return TOP
        power = max(math.log10(max(value, SMALLEST)), self.low)
        share = (power - self.low) / (self.high - self.low)
        return round(TOP + (1 - share) * (HEIGHT - TOP - BOTTOM), 1)

    @property
    def ticks(self) -> list[tuple[float, int]]:
        """Every power of ten, or every few of many: where, and which power."""
        stride = max(1, (self.high - self.low) // 6)
        return [(self.y(10.0**power), power) for power in range(self.low, self.high + 1, stride)]


def _x(index: float, count: int) -> float:
    return round(LEFT + (index + 0.5) * (WIDTH - LEFT - RIGHT) / max(count, 1), 1)


def _number(place: str) -> str:
    return place.rpartition(".")[2]


def _bars(
    axis: LogAxis, values: Sequence[float], labels: Sequence[str]
) -> tuple[float, list[dict[str, Any]]]:
    """How wide a bar is, and where each stands; of many only some have a label."""
    count = len(values)
    width, stride = max(1.5, 0.7 * (WIDTH - LEFT - RIGHT) / count), -(-count // MAX_LABELS)
    bars = [
        {
            "x": round(_x(index, count) - width / 2, 1),
            "y": axis.y(value),
            "height": round(HEIGHT - BOTTOM - axis.y(value), 1),
            "label": label if index % stride == 0 else "",
            "center": _x(index, count),
        }
        for index, (value, label) in enumerate(zip(values, labels, strict=True))
    ]
    return round(width, 1), bars


def layer_plot(layers: Sequence[PartError]) -> dict[str, Any]:
    """A bar for each layer, a line at its baseline and one at its limit."""
    limits = [layer.limit for layer in layers]
    errors = [math.inf if layer.error is None else layer.error for layer in layers]
    axis = LogAxis.of([*limits, *errors])
    width, bars = _bars(axis, errors, [_number(layer.name) for layer in layers])
    for bar, layer, limit in zip(bars, layers, limits, strict=True):
        baseline = axis.y(layer.baseline) if layer.baseline is not None else None
        bar |= {"layer": layer, "baseline": baseline, "limit": axis.y(limit)}
    return {"axis": axis, "bars": bars, "width": width}


def cost_plot(costs: Sequence[TextComparison]) -> dict[str, Any]:
    """A bar for each quantized layer in the model's order, and how sure its height is."""
    ordered = sorted(costs, key=lambda cost: int(_number(cost.name)))
    axis = LogAxis.of([v for cost in ordered for v in (cost.mean_kl, cost.mean_kl + cost.mean_kl_error)])
    width, bars = _bars(axis, [cost.mean_kl for cost in ordered], [_number(cost.name) for cost in ordered])
    for bar, cost in zip(bars, ordered, strict=True):
        high, low = cost.mean_kl + cost.mean_kl_error, cost.mean_kl - cost.mean_kl_error
        bar |= {"cost": cost, "high": axis.y(high), "low": axis.y(max(low, SMALLEST))}
    return {"axis": axis, "bars": bars, "width": width}


def kl_plot(found: NextToken) -> dict[str, Any]:
    """The KL of every row, and the baseline's."""
    axis = LogAxis.of([*found.kl, *found.baseline_kl])
    points = [(_x(i, len(found.kl)), axis.y(value)) for i, value in enumerate(found.kl)]
    baseline = [(_x(i, len(found.kl)), axis.y(value)) for i, value in enumerate(found.baseline_kl)]
    worst: list[tuple[float, float, WorstToken]] = [(*points[place.row], place) for place in found.worst]
    return {
        "axis": axis,
        "line": _joined(points),
        "baseline": _joined(baseline),
        "worst": worst,
        "last": len(found.kl) - 1,
    }


def _joined(points: Iterable[tuple[float, float]]) -> str:
    return " ".join(f"{x:g},{y:g}" for x, y in points)


def drift_plot(drift: Drift) -> dict[str, Any]:
    """Each state's error as a share of its limit over the steps: in the model, and of its recurrence alone."""
    lines = []
    for curve in drift.curves:
        if curve.metric is Metric.RECURRENCE:
            lines.append(("alone", f"{curve.output}, its recurrence alone", curve.limit_fractions))
        elif curve.metric is Metric.RELATIVE_L2:
            kind = curve.output.partition(".")[0]
            lines.append((kind, f"{curve.output}, in the model", curve.limit_fractions))
    axis = LogAxis.of([1.0, *(share for _, _, shares in lines for share in shares)])
    decades = max(math.log10(drift.steps[-1]), 1.0)
    room = WIDTH - LEFT - RIGHT - 16
    xs = [round(LEFT + 8 + room * math.log10(step) / decades, 1) for step in drift.steps]
    return {
        "axis": axis,
        "limit": axis.y(1.0),
        "marks": list(zip(xs, drift.steps, strict=True)),
        "lines": [
            {
                "kind": kind,
                "title": title,
                "points": _joined((x, axis.y(share)) for x, share in zip(xs, shares, strict=True)),
            }
            for kind, title, shares in lines
        ],
    }


def precision_plot(places: Sequence[PlacePrecision]) -> dict[str, Any]:
    """A column for each place, a row for each thing that layers have, a cell where both meet."""
    rows = list(dict.fromkeys(what for place in places for what in place.dtypes))
    width = (WIDTH - ROW_LABEL - RIGHT) / max(len(places), 1)
    stride = -(-len(places) // (MAX_LABELS + 4))
    return {
        "height": TOP + ROW * len(rows) + BOTTOM,
        "rows": [(TOP + ROW * i, what) for i, what in enumerate(rows)],
        "cell": (round(max(width - 1.2, 1.0), 1), ROW - 2),
        "columns": [
            {
                "place": place,
                "x": round(ROW_LABEL + i * width, 1),
                "center": round(ROW_LABEL + (i + 0.5) * width, 1),
                "label": _number(place.place) if i % stride == 0 and place.place[0] == "l" else "",
                "cells": [
                    (TOP + ROW * rows.index(what), what, dtype) for what, dtype in place.dtypes.items()
                ],
            }
            for i, place in enumerate(places)
        ],
    }
