"""Gates grouped for a reader: each scenario's metrics, and how near the worst of each is to its limit."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby

from nemotrt.exporter.report.model import Gate


@dataclass(frozen=True)
class Row:
    """One scenario's gates of one metric."""

    scenario: str
    metric: str
    count: int
    failed: int
    worst: Gate

    @property
    def used(self) -> float:
        """The share of the limit that the worst one uses, in percent."""
        return min(100 * self.worst.limit_fraction, 999.0)


def summary(gates: Sequence[Gate]) -> list[Row]:
    """Each scenario's metrics, with the gate nearest to its limit or furthest beyond it."""

    def place(gate: Gate) -> tuple[str, str]:
        return gate.scenario, gate.metric

    found = []
    for (scenario, metric), group in groupby(sorted(gates, key=place), key=place):
        members = list(group)
        failed = sum(not gate.passed for gate in members)
        found.append(
            Row(scenario, metric, len(members), failed, max(members, key=lambda gate: gate.limit_fraction))
        )
    return found
