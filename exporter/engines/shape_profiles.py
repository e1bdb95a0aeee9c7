"""The optimization profiles of an engine: the range of every axis, with the axes named as in the graph.

Legend: T tokens in a step, B sequences in a step, S state slots, K pages in the pool, M pages of one sequence, R rows
that need logits.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from nemotrt.exporter.config import BuildConfig
from nemotrt.exporter.errors import CompileError
from nemotrt.exporter.runtime.step import pages_of

COMPARED_ROWS = 128
"""Rows of logits that a step may request even if it has fewer sequences, so that a whole prompt can be compared with
PyTorch: 67 MB at a vocabulary of 131072, where a row for each of 2048 tokens would be 1 GB."""

Range = tuple[int, int, int]
"""TensorRT's min, opt and max of an axis."""
Shape = tuple[int, ...]


@dataclass(frozen=True)
class EngineProfile:
    """The range of every axis in one kind of step."""

    name: str
    axes: dict[str, Range]

    def __post_init__(self) -> None:
        assert all(0 <= low <= opt <= high for low, opt, high in self.axes.values()), self

    def shapes(self, axes: Sequence[str | int]) -> tuple[Shape, Shape, Shape]:
        """The min, opt and max shape of an input with these axes; raises CompileError on an unknown axis."""
        for axis in axes:
            if isinstance(axis, str) and axis not in self.axes:
                raise CompileError(f"the graph has an axis {axis}, which no engine profile bounds")
        ranges = [(axis, axis, axis) if isinstance(axis, int) else self.axes[axis] for axis in axes]
        low, opt, high = (tuple(sizes[i] for sizes in ranges) for i in range(3))
        return low, opt, high


def max_rows(config: BuildConfig) -> int:
    """The number of rows of logits that a step may request."""
    return min(config.max_tokens, max(config.max_sequences, COMPARED_ROWS))


def engine_profiles(config: BuildConfig) -> tuple[EngineProfile, ...]:
    """Profiles for decoding, for one prompt, and for any mixture of both; a step uses the first that it fits.

    Raises CompileError if a profile has no room for one sequence of the maximum context.
    """
    tokens, sequences = config.max_tokens, config.max_sequences
    pages = pages_of(config.max_context, config.page_size)
    pools = {
        "S": (2, 1 + sequences, 1 + sequences),
        "K": (2, 1 + sequences * pages, 1 + sequences * pages),
        "M": (1, pages, pages),
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


def _step(max_tokens: int, opt_tokens: int, sequences: int, rows: int) -> dict[str, Range]:
    return {
        "T": (1, opt_tokens, max_tokens),
        "B": (1, sequences, sequences),
        "B+1": (2, sequences + 1, sequences + 1),
        "R": (1, min(sequences, rows), rows),
    }


def check_holds_one(profile: EngineProfile, config: BuildConfig) -> None:
    """Raise CompileError with the axis that has no room for one sequence of the maximum context."""
    pages = pages_of(config.max_context, config.page_size)
    needed = {
        "T": (1, "--max-tokens"),
        "B": (1, "--max-sequences"),
        "S": (2, "--max-sequences"),
        "K": (1 + pages, "--max-context or --max-sequences"),
        "M": (pages, "--max-context"),
        "R": (1, "--max-tokens"),
    }
    for axis, (size, flag) in needed.items():
        max_size = profile.axes[axis][2]
        if max_size < size:
            raise CompileError(
                f"the engine's {profile.name} profile has at most {max_size} of axis {axis};"
                f" one sequence of {config.max_context} tokens needs {size}",
                hint=f"give a larger {flag}",
            )
