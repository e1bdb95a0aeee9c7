"""One step's inputs: the check that they follow the graph's contract, and their padding to sizes an engine runs.

Legend: T tokens in this step, B sequences in this step, M pages of one sequence, R rows that need logits.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple, TypeVar

import numpy as np
from numpy.typing import NDArray

from nemotrt.exporter.errors import UsageError
from nemotrt.plugins.contract import STEP_INPUTS

Integer = TypeVar("Integer", np.int32, np.int64)


@dataclass(frozen=True)
class StepInputs:
    """The graph's inputs that describe a step, under the contract's names."""

    input_ids: NDArray[np.int64]
    """[T]: tokens of all sequences, one after the other."""
    query_start: NDArray[np.int32]
    """[B+1]: sequence b owns tokens query_start[b] : query_start[b+1]; later tokens are padding."""
    context_len: NDArray[np.int32]
    """[B]: the number of tokens already in the sequence's state; 0 for a new sequence."""
    slot: NDArray[np.int32]
    """[B]: the sequence's row in the recurrent pools (vLLM's sequence slot)."""
    page_table: NDArray[np.int32]
    """[B, M]: the sequence's pages in the KV pools (vLLM's block table); unused entries are 0."""
    logits_row: NDArray[np.int32]
    """[R]: the tokens that need logits."""

    def as_dict(self) -> dict[str, NDArray[Any]]:
        """The arrays by name, in the contract's order."""
        return {name: getattr(self, name) for name in STEP_INPUTS}


def pages_of(num_tokens: int, page_size: int) -> int:
    """The number of pages for this many tokens; 0 without a KV cache (`page_size` 0)."""
    return -(-num_tokens // page_size) if page_size else 0


def check_step(
    inputs: StepInputs, *, vocab_size: int, num_slots: int, num_pages: int, page_size: int
) -> None:
    """Raise UsageError with the first input that breaks the contract; `page_size` is 0 without a KV cache."""
    _check_arrays(inputs)
    _check_sequences(inputs)
    _check_range("input_ids", inputs.input_ids, 0, vocab_size, "the vocabulary")
    _check_range("logits_row", inputs.logits_row, 0, len(inputs.input_ids), "this step's tokens")
    _check_slots(inputs, num_slots)
    if page_size:
        _check_pages(inputs, num_pages, page_size)


def _check_arrays(inputs: StepInputs) -> None:
    for name, (dtype, axes) in STEP_INPUTS.items():
        array = getattr(inputs, name)
        if array.dtype != dtype or array.ndim != len(axes):
            raise UsageError(
                f"{name} is {array.dtype} of rank {array.ndim}, but the graph takes {dtype} of rank {len(axes)}"
            )
    num_sequences = len(inputs.context_len)
    if not len(inputs.input_ids) or not num_sequences:
        raise UsageError("a step needs at least one token and one sequence")
    sizes = {"query_start": num_sequences + 1, "slot": num_sequences, "page_table": num_sequences}
    for name, size in sizes.items():
        if len(getattr(inputs, name)) != size:
            raise UsageError(
                f"{name} has {len(getattr(inputs, name))} rows; {num_sequences} sequences need {size}"
            )


def _check_sequences(inputs: StepInputs) -> None:
    start = inputs.query_start
    if start[0] != 0 or (np.diff(start) < 0).any() or start[-1] > len(inputs.input_ids):
        raise UsageError(
            f"query_start is {start.tolist()}: it must start at 0, never fall, and end within the"
            f" {len(inputs.input_ids)} tokens"
        )
    if (inputs.context_len < 0).any():
        raise UsageError(
            f"context_len holds {int(inputs.context_len.min())}, which is not a number of tokens"
        )


def _check_range(name: str, values: NDArray[Any], low: int, high: int, what: str) -> None:
    outside = values[(values < low) | (values >= high)]
    if outside.size:
        raise UsageError(f"{name} holds {int(outside[0])}, outside {what} ({low} to {high - 1})")


def _check_slots(inputs: StepInputs, num_slots: int) -> None:
    _check_range("slot", inputs.slot, 0, num_slots, "the session's slots")
    is_live = np.diff(inputs.query_start) > 0
    if (inputs.slot[is_live] == 0).any():
        raise UsageError("slot holds 0 for a sequence that has tokens; slot 0 is scratch")
    # An empty sequence writes its slot's old contents back: with another's slot that would undo the step.
    _check_unique("slot", inputs.slot[inputs.slot > 0])


def _check_pages(inputs: StepInputs, num_pages: int, page_size: int) -> None:
    _check_range("page_table", inputs.page_table, 0, num_pages, "the session's pages")
    length = np.diff(inputs.query_start)
    used = -(-(inputs.context_len + length) // page_size) * (length > 0)
    if (used > inputs.page_table.shape[1]).any():
        raise UsageError(
            f"page_table has {inputs.page_table.shape[1]} columns, but a sequence of this step takes"
            f" {int(used.max())} pages of {page_size} tokens"
        )
    pages = inputs.page_table[np.arange(inputs.page_table.shape[1]) < used[:, None]]
    if (pages == 0).any():
        raise UsageError("page_table holds 0 for a page that a sequence uses; page 0 is scratch")
    _check_unique("page_table", pages)


def _check_unique(name: str, rows: NDArray[np.int32]) -> None:
    values, counts = np.unique(rows, return_counts=True)
    if (counts > 1).any():
        raise UsageError(f"{name} gives {int(values[counts > 1][0])} to two sequences or twice to one")


SIZED_BY = {"T": ("input_ids", 0), "B": ("context_len", 0), "M": ("page_table", 1), "R": ("logits_row", 0)}
"""An axis of StepSizes, in its order → an input that has it, and the axis' position."""


class StepSizes(NamedTuple):
    """The sizes of a step's axes."""

    T: int
    B: int
    M: int
    R: int

    @classmethod
    def of(cls, inputs: StepInputs) -> StepSizes:
        """The sizes of these inputs."""
        return cls(*(getattr(inputs, name).shape[position] for name, position in SIZED_BY.values()))

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
