"""What a runner produced in one scenario: its logits, and the rows of the pools that the steps write.

Which rows those are follows from the steps alone. Everything else in a pool must keep its initial contents, so it is
counted and not stored: the pools of a large profile would otherwise be in memory once for each runner.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from nemotrt.exporter.runtime.step import StepInputs
from nemotrt.exporter.validation.metrics import Values
from nemotrt.exporter.validation.routing import RouterLogits

Noise = dict[str, NDArray[np.float32]]
"""The initial contents of every pool."""


@dataclass(frozen=True)
class Observation:
    """What one runner produced in one scenario."""

    logits_RV: Values
    """The logits of all steps."""
    pools: dict[str, Values]
    """The rows that the steps write, after the last step: slots, or positions of pages [N, 2, V, D]."""
    out_of_bounds: dict[str, int] = field(default_factory=dict)
    """By pool: values outside these rows and the scratch row that changed."""
    routers: tuple[RouterLogits, ...] = ()
    """One per step, without padding; empty entries if the runner does not output router logits."""


def observed(
    logits: Sequence[Values],
    read_pool: Callable[[str], Values],
    noise: Noise,
    steps: Sequence[StepInputs],
    routers: Iterable[RouterLogits] = (),
) -> Observation:
    """The observation of a runner whose pools started as `noise` and ran these steps; one pool is read at a time."""
    rows, out_of_bounds = {}, {}
    for name, initial in noise.items():
        pool = read_pool(name)
        places = written_places(name, pool, steps)
        rows[name] = pool[places]
        out_of_bounds[name] = num_stray(pool, initial, places)
    return Observation(np.concatenate(logits), rows, out_of_bounds, tuple(routers))


def num_stray(pool: NDArray[Any], initial: NDArray[Any], places: tuple[Any, ...]) -> int:
    """How many values changed outside these places and the scratch row."""
    changed = pool != initial
    changed[places], changed[0] = False, False
    return int(np.count_nonzero(changed))


def written_places(name: str, pool: Any, steps: Sequence[StepInputs]) -> tuple[Any, ...]:
    """The index of the rows of a pool that the steps write: every slot, or every position of a page, once."""
    if not name.startswith("kv_cache."):
        slots = [inputs.slot[np.diff(inputs.query_start) > 0] for inputs in steps]
        return (np.unique(np.concatenate(slots)),)
    page_size = pool.shape[3]
    places = []
    for inputs in steps:
        lengths = np.diff(inputs.query_start)
        for context, length, pages in zip(inputs.context_len, lengths, inputs.page_table, strict=True):
            positions = np.arange(context, context + length)
            places.append(pages[positions // page_size] * np.int64(page_size) + positions % page_size)
    unique = np.unique(np.concatenate(places))
    return unique // page_size, slice(None), slice(None), unique % page_size
