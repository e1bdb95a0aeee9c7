"""One step's inputs, and the check that they follow the graph's contract, so that no kernel reads out of bounds.

Legend: T tokens in this step, B sequences in this step, M pages of one sequence, R rows that want logits.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from nemotrt.exporter.errors import UsageError
from nemotrt.plugins.contract import STEP_INPUTS


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
    """[R]: which tokens want logits."""

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
