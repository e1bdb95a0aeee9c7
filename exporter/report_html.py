"""A validation's report as one HTML file that loads nothing: verdict first, then plots and tables.

Plots are SVG written by the template: a few kilobytes each, sharp at any width, coloured by the page's own theme.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.resources import files
from typing import Any

from nemotrt.exporter.artifacts import LayerError, NextToken, TextPlace, ValidationReport
from nemotrt.exporter.gate_summary import strain, summary
from nemotrt.exporter.runtime.manifest import Manifest
from nemotrt.exporter.runtime.tokenizer import Tokenizer

WIDTH, HEIGHT = 720, 240
LEFT, RIGHT, TOP, BOTTOM = 52, 8, 10, 26
SMALLEST = 1e-12
"""What a logarithmic axis shows of zero."""


def report_html(
    report: ValidationReport,
    *,
    name: str,
    manifest: Manifest | None = None,
    tokenizer: Tokenizer | None = None,
    seconds: float | None = None,
) -> str:
    """The page; without a tokenizer the worst tokens are shown as ids."""
    from jinja2 import Environment, StrictUndefined

    source = files("nemotrt.exporter").joinpath("report.html").read_text(encoding="utf-8")
    environment = Environment(
        autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    environment.filters |= {"number": number, "text": lambda tokens: _text(tokens, tokenizer)}
    return environment.from_string(source).render(
        name=name,
        report=report,
        manifest=manifest,
        seconds=seconds,
        failed=sorted((gate for gate in report.gates if not gate.passed), key=strain, reverse=True),
        rows=summary(report.gates),
        layers=_layer_plot(report.layers) if report.layers else None,
        kinds=list(dict.fromkeys(layer.kind for layer in report.layers)),
        positions=[(found, _kl_plot(found)) for found in report.next_token],
    )


def number(value: float | None) -> str:
    """Three digits, nothing for what is not known."""
    return "" if value is None else f"{value:.3g}"


def _text(tokens: Sequence[int], tokenizer: Tokenizer | None) -> str:
    return tokenizer.decode(tokens) if tokenizer else " ".join(map(str, tokens))


@dataclass(frozen=True)
class LogAxis:
    """A logarithmic axis from one power of ten to another."""

    low: int
    high: int

    @classmethod
    def of(cls, values: Sequence[float]) -> LogAxis:
        """What shows all values that are not zero."""
        powers = [math.log10(max(value, SMALLEST)) for value in values if value > 0] or [-1.0, 0.0]
        low = math.floor(min(powers))
        return cls(low, max(math.ceil(max(powers)), low + 1))

    def y(self, value: float) -> float:
        """Where a value stands, from the top."""
        power = max(math.log10(max(value, SMALLEST)), self.low)
        share = (power - self.low) / (self.high - self.low)
        return round(TOP + (1 - share) * (HEIGHT - TOP - BOTTOM), 1)

    @property
    def ticks(self) -> list[tuple[float, str]]:
        """Every power of ten, or every few of many."""
        stride = max(1, (self.high - self.low) // 6)
        return [(self.y(10.0**power), f"1e{power}") for power in range(self.low, self.high + 1, stride)]


def _x(index: float, count: int) -> float:
    return round(LEFT + (index + 0.5) * (WIDTH - LEFT - RIGHT) / max(count, 1), 1)


def _layer_plot(layers: Sequence[LayerError]) -> dict[str, Any]:
    """A bar for each layer and a line at the floor."""
    axis = LogAxis.of([v for layer in layers for v in (layer.error, layer.floor or 0.0)])
    width = max(1.5, 0.7 * (WIDTH - LEFT - RIGHT) / len(layers))
    stride = -(-len(layers) // 20)
    bars = []
    for index, layer in enumerate(layers):
        top, x = axis.y(layer.error), _x(index, len(layers))
        bars.append(
            {
                "layer": layer,
                "x": round(x - width / 2, 1),
                "y": top,
                "height": round(HEIGHT - BOTTOM - top, 1),
                "floor": axis.y(layer.floor) if layer.floor is not None else None,
                "label": layer.place.rpartition(".")[2] if index % stride == 0 else "",
                "center": x,
            }
        )
    return {"axis": axis, "bars": bars, "width": round(width, 1)}


def _kl_plot(found: NextToken) -> dict[str, Any]:
    """The KL of every row, and the floor's."""
    axis = LogAxis.of([*found.kl, *found.floor_kl])
    points = [(_x(i, len(found.kl)), axis.y(value)) for i, value in enumerate(found.kl)]
    floor = [(_x(i, len(found.kl)), axis.y(value)) for i, value in enumerate(found.floor_kl)]
    worst: list[tuple[float, float, TextPlace]] = [(*points[place.row], place) for place in found.worst]
    return {
        "axis": axis,
        "line": " ".join(f"{x},{y}" for x, y in points),
        "floor": " ".join(f"{x},{y}" for x, y in floor),
        "worst": worst,
        "last": len(found.kl) - 1,
    }
