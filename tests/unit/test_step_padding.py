"""A padded step is the same step: what is added owns nothing and asks for nothing new."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from runtime_graph import int32

from nemotrt.exporter.runtime.step import StepInputs, StepSizes, batch_sizes, check_step, is_decode, padded


def step(lengths: list[int], pages: int = 2) -> StepInputs:
    """Sequences of these lengths, each with pages of its own."""
    count = len(lengths)
    return StepInputs(
        input_ids=np.arange(sum(lengths), dtype=np.int64),
        query_start=np.cumsum([0, *lengths]).astype(np.int32),
        context_len=np.zeros(count, dtype=np.int32),
        slot=np.arange(1, count + 1, dtype=np.int32),
        page_table=np.arange(1, 1 + count * pages, dtype=np.int32).reshape(count, pages),
        logits_row=int32(sum(lengths) - 1),
    )


@given(st.lists(st.integers(0, 3), min_size=1, max_size=5).filter(any), st.integers(0, 3), st.integers(0, 4))
def test_a_padded_step_keeps_the_contract_and_what_was_asked(
    lengths: list[int], more: int, tokens: int
) -> None:
    inputs = step(lengths)
    own = StepSizes.of(inputs)
    sizes = StepSizes(T=own.T + tokens, B=own.B + more, M=own.M + more, R=own.R + tokens)
    longer = padded(inputs, sizes)
    assert StepSizes.of(longer) == sizes
    check_step(longer, vocab_size=99, num_slots=9, num_pages=99, page_size=2)
    for name in ("input_ids", "context_len", "slot", "logits_row", "query_start"):
        before, after = getattr(inputs, name), getattr(longer, name)
        assert after.dtype == before.dtype
        np.testing.assert_array_equal(after[: len(before)], before)
    np.testing.assert_array_equal(longer.page_table[: own.B, : own.M], inputs.page_table)
    # Nothing that was added is anybody's: no tokens, scratch slots, scratch pages.
    assert (np.diff(longer.query_start)[own.B :] == 0).all()
    assert not longer.slot[own.B :].any()
    assert not longer.page_table[own.B :].any()


@pytest.mark.parametrize(
    ("lengths", "expected"), [([1, 1], True), ([0, 1], True), ([2], False), ([1, 3, 1], False)]
)
def test_decode_is_at_most_a_token_each(lengths: list[int], expected: bool) -> None:
    assert is_decode(step(lengths)) is expected


@pytest.mark.parametrize(
    ("most", "expected"), [(1, (1,)), (2, (1, 2)), (3, (1, 2, 3)), (8, (1, 2, 4, 8)), (12, (1, 2, 4, 8, 12))]
)
def test_batch_sizes_double_up_to_the_most(most: int, expected: tuple[int, ...]) -> None:
    assert batch_sizes(most) == expected
