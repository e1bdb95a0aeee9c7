"""What a bisection found, for a person: each diverging value, where it is, and what its node reads."""

from __future__ import annotations

from collections.abc import Iterator

from rich.console import RenderableType
from rich.table import Table
from rich.text import Text

from nemotrt.exporter.report.model import Bisection, DivergentValue

WRONG = ("DIFFERS", "not compared", "shape")
"""Words in what a node reads that make it a likely cause."""


def bisection(found: Bisection) -> Iterator[RenderableType]:
    """The first diverging value of each part; without any, which is the nearest to its limit."""
    looked = f"{found.num_values} values inside the parts, each part alone; {found.runs_as}"
    if found.diverging:
        yield Text.assemble(
            ("departs", "red"), f": the first of {len(found.diverging)} parts is below; {looked}"
        )
    else:
        yield Text.assemble(("nothing departs", "green"), f": {looked}")
    for suspect in found.diverging:
        yield ""
        yield _suspect(suspect)
    if found.nearest and not found.diverging:
        used = f"{100 * found.nearest.limit_fraction:.0f}% of its limit"
        yield Text(f"nearest to its limit: {found.nearest.tensor}, {found.nearest.op}, {used}")
    if found.num_unmatched:
        yield Text(f"not compared: {found.num_unmatched} values that PyTorch does not have", "dim")
    if found.marking_changed:
        parts = ", ".join(found.marking_changed)
        yield Text(f"as outputs, inner values changed the bits of the results of {parts}", "yellow")


def _suspect(suspect: DivergentValue) -> Table:
    grid = Table.grid(padding=(0, 2))
    grid.add_row(Text("layer", "bold"), Text.assemble((suspect.place, "bold"), f", {suspect.kind}"))
    grid.add_row("op", f"{suspect.node}, {suspect.op}")
    grid.add_row("tensor", f"{suspect.tensor} [{', '.join(suspect.shape)}]")
    base = "" if suspect.baseline is None else f", baseline {suspect.baseline:.3g}"
    error = "not finite" if suspect.error is None else f"{suspect.error:.3g}"
    grid.add_row("error", Text.assemble((error, "red"), f" relative L2, limit {suspect.limit:.3g}{base}"))
    place = ", ".join(map(str, suspect.index))
    sides = f"{_number(suspect.candidate)} where PyTorch has {_number(suspect.reference)}"
    grid.add_row("worst", f"step {suspect.step}, [{place}]: {sides}")
    for number, line in enumerate(suspect.reads):
        style = "yellow" if any(word in line for word in WRONG) else "dim"
        grid.add_row("" if number else "reads", Text(line, style))
    return grid


def _number(value: float | None) -> str:
    return "no number" if value is None else f"{value:.6g}"
