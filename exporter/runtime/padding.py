"""Steps padded to fixed sizes, so that few shapes ever reach an engine: padding writes to scratch only.

Legend: T tokens in this step, B sequences in this step, M pages of one sequence, R rows that want logits.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TypeVar

import numpy as np
from numpy.typing import NDArray

from nemotrt.exporter.runtime.step import StepInputs

Integer = TypeVar("Integer", np.int32, np.int64)


AXES = ("T", "B", "M", "R")


@dataclass(frozen=True)
class StepSizes:
    """A step's free axes."""

    T: int
    B: int
    M: int
    R: int

    @classmethod
    def of(cls, inputs: StepInputs) -> StepSizes:
        """The sizes of these inputs."""
        return cls(
            T=len(inputs.input_ids),
            B=len(inputs.context_len),
            M=inputs.page_table.shape[1],
            R=len(inputs.logits_row),
        )

    def at_least(self, least: StepSizes) -> StepSizes:
        """These sizes, each raised to the least where it is below it."""
        return StepSizes(*(max(getattr(self, axis), getattr(least, axis)) for axis in AXES))

    def fits(self, least: StepSizes, most: StepSizes) -> bool:
        """Whether every axis lies within its bounds."""
        return all(getattr(least, axis) <= getattr(self, axis) <= getattr(most, axis) for axis in AXES)


def is_decode(inputs: StepInputs) -> bool:
    """Whether no sequence has more than one token."""
    return bool((np.diff(inputs.query_start) <= 1).all())


def batch_sizes(max_sequences: int) -> tuple[int, ...]:
    """The sizes that decode steps are padded to: powers of two, and the most."""
    powers = [1 << i for i in range(max_sequences.bit_length()) if 1 << i < max_sequences]
    return (*powers, max_sequences)


def padded(inputs: StepInputs, sizes: StepSizes) -> StepInputs:
    """The step with empty sequences and padding tokens up to `sizes`, none of which is below its own.

    Further rows of logits are those of token 0: the caller drops them.
    """
    own = StepSizes.of(inputs)
    assert own.fits(own, sizes), (own, sizes)
    more = sizes.B - own.B
    table_BM = np.zeros((sizes.B, sizes.M), dtype=np.int32)
    table_BM[: own.B, : own.M] = inputs.page_table
    return StepInputs(
        input_ids=_longer(inputs.input_ids, sizes.T),
        query_start=np.concatenate([inputs.query_start, np.repeat(inputs.query_start[-1:], more)]),
        context_len=_longer(inputs.context_len, sizes.B),
        slot=_longer(inputs.slot, sizes.B),
        page_table=table_BM,
        logits_row=_longer(inputs.logits_row, sizes.R),
    )


def _longer(values: NDArray[Integer], size: int) -> NDArray[Integer]:
    return np.concatenate([values, np.zeros(size - len(values), dtype=values.dtype)])
