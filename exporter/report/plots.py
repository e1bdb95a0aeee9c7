"""Coordinates of the HTML report's plots in SVG units; the template draws them.

A plot is 720 units wide and 240 high, and the page scales it to its own width.
"""

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from nemotrt.exporter.report.model import Drift, Metric, NextToken, PartError, TextComparison

WIDTH, HEIGHT = 720, 240
LEFT, RIGHT, TOP, BOTTOM = 52, 8, 10, 30
PLOT_WIDTH, PLOT_HEIGHT = WIDTH - LEFT - RIGHT, HEIGHT - TOP - BOTTOM
MIN_VALUE = 1e-12
"""The lowest value on a logarithmic axis; smaller ones are drawn there."""
MAX_LABELS = 20
"""Layers that are labeled below a plot."""


class LogAxis:
    """A logarithmic y axis that covers the positive values, from one power of ten to another."""

    def __init__(self, values: Iterable[float]) -> None:
        powers = [math.log10(max(value, MIN_VALUE)) for value in values if 0 < value < math.inf]
        self.low = math.floor(min(powers, default=-1))
        self.high = max(math.ceil(max(powers, default=0)), self.low + 1)

    def y(self, value: float) -> float:
        """The y coordinate of a value; a value that is not finite is drawn at the top."""
        if not math.isfinite(value):
            return TOP
        power = max(math.log10(max(value, MIN_VALUE)), self.low)
        return round(TOP + (self.high - power) / (self.high - self.low) * PLOT_HEIGHT, 1)

    @property
    def ticks(self) -> list[tuple[float, int]]:
        """The y coordinate and the exponent of each power of ten, or of every nth if there are many."""
        stride = max(1, (self.high - self.low) // 6)
        return [(self.y(10.0**power), power) for power in range(self.low, self.high + 1, stride)]


def layer_plot(layers: Sequence[PartError]) -> dict[str, Any]:
    """A bar for the error of each layer, with marks at its rounding baseline and its limit."""
    errors = [math.inf if layer.error is None else layer.error for layer in layers]
    axis = LogAxis([*errors, *(layer.limit for layer in layers)])
    marks = [{"baseline": layer.baseline, "limit": layer.limit} for layer in layers]
    return _bar_plot(axis, layers, errors, marks)


def cost_plot(layers: Sequence[TextComparison]) -> dict[str, Any]:
    """A bar for the mean KL of each quantized layer, with marks one standard error above and below."""
    layers = sorted(layers, key=lambda layer: int(_label(layer.name)))
    marks = [{"low": x.mean_kl - x.mean_kl_error, "high": x.mean_kl + x.mean_kl_error} for x in layers]
    values = [layer.mean_kl for layer in layers]
    return _bar_plot(LogAxis([*values, *(mark["high"] for mark in marks)]), layers, values, marks)


def _bar_plot(
    axis: LogAxis,
    layers: Sequence[PartError | TextComparison],
    values: Sequence[float],
    marks: Sequence[Mapping[str, float | None]],
) -> dict[str, Any]:
    width, stride = max(1.5, 0.7 * PLOT_WIDTH / len(layers)), -(-len(layers) // MAX_LABELS)
    bars = []
    for index, (layer, value, levels) in enumerate(zip(layers, values, marks, strict=True)):
        center, y = _x(index, len(layers)), axis.y(value)
        bars.append(
            {
                "layer": layer,
                "label": _label(layer.name) if index % stride == 0 else "",
                "center": center,
                "x": round(center - width / 2, 1),
                "y": y,
                "height": round(HEIGHT - BOTTOM - y, 1),
                "marks": {name: axis.y(level) for name, level in levels.items() if level is not None},
            }
        )
    return {"axis": axis, "bars": bars, "width": round(width, 1)}


def _x(index: int, count: int) -> float:
    return round(LEFT + (index + 0.5) * PLOT_WIDTH / count, 1)


def _label(place: str) -> str:
    return place.rpartition(".")[2]


def _points(xs: Iterable[float], ys: Iterable[float]) -> str:
    return " ".join(f"{x:g},{y:g}" for x, y in zip(xs, ys, strict=True))


def kl_plot(tokens: NextToken) -> dict[str, Any]:
    """A line for the KL of each token, another for its rounding baseline, and a dot at each of the worst tokens."""
    axis = LogAxis([*tokens.kl, *tokens.baseline_kl])
    count = len(tokens.kl)
    xs = [_x(index, count) for index in range(count)]
    return {
        "axis": axis,
        "line": _points(xs, map(axis.y, tokens.kl)),
        "baseline": _points(xs, map(axis.y, tokens.baseline_kl)) if tokens.baseline_kl else "",
        "worst": [(xs[token.row], axis.y(tokens.kl[token.row]), token) for token in tokens.worst],
        "last": count - 1,
    }


def drift_plot(drift: Drift) -> dict[str, Any]:
    """A line for each state: the fraction of its limit that its error uses, over the decode steps."""
    states = [curve for curve in drift.curves if curve.metric in (Metric.RELATIVE_L2, Metric.RECURRENCE)]
    axis = LogAxis([1.0, *(fraction for curve in states for fraction in curve.limit_fractions)])
    decades = max(math.log10(drift.steps[-1]), 1.0)
    margin = 8
    span = (PLOT_WIDTH - 2 * margin) / decades
    xs = [round(LEFT + margin + span * math.log10(step), 1) for step in drift.steps]
    return {
        "axis": axis,
        "limit": axis.y(1.0),
        "marks": list(zip(xs, drift.steps, strict=True)),
        "lines": [
            {
                "kind": "alone" if curve.metric is Metric.RECURRENCE else curve.output.partition(".")[0],
                "title": f"{curve.output}, {curve.metric}",
                "points": _points(xs, map(axis.y, curve.limit_fractions)),
            }
            for curve in states
        ],
    }
