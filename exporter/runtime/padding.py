"""Steps padded to a few fixed sizes, so that few shapes reach an engine; padding writes to scratch rows only.

Legend: T tokens in this step, B sequences in this step, M pages of one sequence, R rows that want logits.
"""

from __future__ import annotations

from typing import NamedTuple, TypeVar

import numpy as np
from numpy.typing import NDArray

from nemotrt.exporter.runtime.step import StepInputs

Integer = TypeVar("Integer", np.int32, np.int64)


class StepSizes(NamedTuple):
    """The sizes of a step's axes."""

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

    def at_least(self, minimum: StepSizes) -> StepSizes:
        """These sizes, each raised to the minimum if it is smaller."""
        return StepSizes(*map(max, self, minimum))

    def fits(self, minimum: StepSizes, maximum: StepSizes) -> bool:
        """Whether every size is within its bounds."""
        return all(low <= size <= high for low, size, high in zip(minimum, self, maximum, strict=True))


def is_decode(inputs: StepInputs) -> bool:
    """Whether no sequence has more than one token."""
    return bool((np.diff(inputs.query_start) <= 1).all())


def batch_sizes(max_sequences: int) -> tuple[int, ...]:
    """The batch sizes that decode steps are padded to: powers of two, and the maximum."""
    powers = [1 << i for i in range(max_sequences.bit_length()) if 1 << i < max_sequences]
    return (*powers, max_sequences)


def padded(inputs: StepInputs, sizes: StepSizes) -> StepInputs:
    """The step with empty sequences and padding tokens added up to `sizes`, which must not be smaller than the step.

    Added rows of logits are those of token 0; the caller discards them.
    """
    size = StepSizes.of(inputs)
    assert size.fits(size, sizes), (size, sizes)
    table_BM = np.zeros((sizes.B, sizes.M), dtype=np.int32)
    table_BM[: size.B, : size.M] = inputs.page_table
    return StepInputs(
        input_ids=_longer(inputs.input_ids, sizes.T),
        query_start=np.concatenate(
            [inputs.query_start, np.repeat(inputs.query_start[-1:], sizes.B - size.B)]
        ),
        context_len=_longer(inputs.context_len, sizes.B),
        slot=_longer(inputs.slot, sizes.B),
        page_table=table_BM,
        logits_row=_longer(inputs.logits_row, sizes.R),
    )


def _longer(values: NDArray[Integer], size: int) -> NDArray[Integer]:
    return np.concatenate([values, np.zeros(size - len(values), dtype=values.dtype)])
