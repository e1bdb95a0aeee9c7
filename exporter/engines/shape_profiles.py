"""The sizes that an engine is built for, named as the graph names its axes.

Legend: T tokens in a step, B sequences in a step, S state slots, K pages in the pool, M pages of one
sequence, R rows that want logits.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from nemotrt.exporter.config import BuildConfig
from nemotrt.exporter.errors import CompileError
from nemotrt.exporter.runtime.step import pages_of

COMPARED_ROWS = 128
"""Rows of logits that a step may ask for even where it has fewer sequences, so that a whole prompt can be
compared with PyTorch: 67 MB at a vocabulary of 131072, where a row for each of 2048 tokens would be 1 GB."""

Shape = tuple[int, ...]


@dataclass(frozen=True)
class Bounds:
    """The least, the best and the most of an axis."""

    least: int
    best: int
    most: int

    def __post_init__(self) -> None:
        assert 0 <= self.least <= self.best <= self.most, self


@dataclass(frozen=True)
class EngineProfile:
    """One kind of step that an engine is tuned for: every axis' bounds."""

    name: str
    axes: dict[str, Bounds]

    def shapes(self, axes: Sequence[str | int]) -> tuple[Shape, Shape, Shape]:
        """Least, best and most shape of an input with these axes; raises CompileError on an unknown one."""
        unknown = [axis for axis in axes if isinstance(axis, str) and axis not in self.axes]
        if unknown:
            raise CompileError(f"the graph has an axis {unknown[0]}, which no engine profile bounds")
        bounds = [Bounds(axis, axis, axis) if isinstance(axis, int) else self.axes[axis] for axis in axes]
        return (
            tuple(bound.least for bound in bounds),
            tuple(bound.best for bound in bounds),
            tuple(bound.most for bound in bounds),
        )


def max_rows(config: BuildConfig) -> int:
    """Rows of logits that a step may ask for."""
    return min(config.max_tokens, max(config.max_sequences, COMPARED_ROWS))


def engine_profiles(config: BuildConfig) -> tuple[EngineProfile, ...]:
    """Profiles for decoding, for one prompt, and for any mixture; a step takes the first that holds it.

    Raises CompileError when a profile could not hold one sequence of the longest context.
    """
    tokens, sequences = config.max_tokens, config.max_sequences
    pages = pages_of(config.max_context, config.page_size)
    pools = {
        "S": Bounds(2, 1 + sequences, 1 + sequences),
        "K": Bounds(2, 1 + sequences * pages, 1 + sequences * pages),
        "M": Bounds(1, pages, pages),
    }
    rows = max_rows(config)
    profiles = (
        EngineProfile("decode", _step(sequences, sequences, sequences, sequences) | pools),
        EngineProfile("prefill", _step(tokens, tokens, 1, rows) | pools),
        EngineProfile("mixture", _step(tokens, -(-tokens // 2), sequences, rows) | pools),
    )
    for profile in profiles:
        check_holds_one(profile, config)
    return profiles


def _step(most_tokens: int, best_tokens: int, sequences: int, rows: int) -> dict[str, Bounds]:
    return {
        "T": Bounds(1, best_tokens, most_tokens),
        "B": Bounds(1, sequences, sequences),
        "B+1": Bounds(2, sequences + 1, sequences + 1),
        "R": Bounds(1, min(sequences, rows), rows),
    }


def check_holds_one(profile: EngineProfile, config: BuildConfig) -> None:
    """Raise CompileError that names the axis on which one sequence of the longest context has no room."""
    pages = pages_of(config.max_context, config.page_size)
    needed: Mapping[str, tuple[int, str]] = {
        "T": (1, "--max-tokens"),
        "B": (1, "--max-sequences"),
        "S": (2, "--max-sequences"),
        "K": (1 + pages, "--max-context or --max-sequences"),
        "M": (pages, "--max-context"),
        "R": (1, "--max-tokens"),
    }
    for axis, (least, flag) in needed.items():
        most = profile.axes[axis].most
        if most < least:
            raise CompileError(
                f"the engine's {profile.name} profile has at most {most} of axis {axis};"
                f" one sequence of {config.max_context} tokens needs {least}",
                hint=f"give a larger {flag}",
            )
