"""The scheduler feeds every token of every request once and in order, within its limits, and always ends."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from nemotrt.exporter.errors import UsageError
from nemotrt.exporter.generation.scheduler import Limits, PlannedStep, Request, Scheduler
from nemotrt.exporter.runtime.step import check_step, pages_of

ROOMY = Limits(max_tokens=16, max_sequences=4, max_context=64, page_size=4, num_slots=5, num_pages=99)


def token_of(number: int, position: int) -> int:
    """The token that a request's stand-in model puts at a position: no two are alike."""
    return number * 1000 + position


def request(number: int, prompt: int, new: int) -> Request:
    return Request(number, tuple(token_of(number, i) for i in range(prompt)), new)


def drive(limits: Limits, requests: list[Request], ends_after: dict[int, int]) -> list[PlannedStep]:
    """Run all requests; `ends_after` is how many new tokens a request really makes. Checks every step."""
    scheduler = Scheduler(limits)
    for one in requests:
        scheduler.submit(one)
    seen: dict[int, list[int]] = {one.number: [] for one in requests}
    made = dict.fromkeys(seen, 0)
    steps = []
    while not scheduler.is_done:
        step = scheduler.next_step()
        steps.append(step)
        check_step(
            step.inputs,
            vocab_size=10**9,
            num_slots=limits.num_slots,
            num_pages=limits.num_pages,
            page_size=limits.page_size,
        )
        assert 1 <= len(step.inputs.input_ids) <= limits.max_tokens
        assert len(step.counts) <= limits.max_sequences
        tokens = np.split(step.inputs.input_ids, step.inputs.query_start[1:-1])
        for b, (number, piece) in enumerate(zip(step.counts, tokens, strict=True)):
            assert step.inputs.context_len[b] == len(seen[number])
            seen[number] += piece.tolist()
        wanting = [int(step.inputs.input_ids[row]) // 1000 for row in step.inputs.logits_row]
        assert wanting == list(step.wanting)
        new, ended = {}, []
        for one in requests:
            if one.number in step.wanting:
                new[one.number] = token_of(one.number, len(one.prompt) + made[one.number])
                made[one.number] += 1
                if made[one.number] == ends_after[one.number]:
                    ended.append(one.number)
        scheduler.complete(step, new, ended)
    for one in requests:
        length = len(one.prompt) + ends_after[one.number] - 1
        assert seen[one.number] == [token_of(one.number, i) for i in range(length)]
    return steps


@st.composite
def workloads(draw: st.DrawFn) -> tuple[Limits, list[Request], dict[int, int]]:
    page_size = draw(st.sampled_from([0, 1, 4]))
    sizes = st.tuples(st.integers(1, 30), st.integers(1, 12))
    requests = [request(i, *draw(sizes)) for i in range(draw(st.integers(1, 7)))]
    largest = max(pages_of(len(one.prompt) + one.max_new_tokens - 1, page_size) for one in requests)
    max_sequences = draw(st.integers(1, 4))
    limits = Limits(
        max_tokens=max_sequences + draw(st.integers(0, 12)),
        max_sequences=max_sequences,
        max_context=42,
        page_size=page_size,
        num_slots=draw(st.integers(2, 6)),
        num_pages=1 + max(1, largest) + draw(st.integers(0, 10)),
    )
    return limits, requests, {one.number: draw(st.integers(1, one.max_new_tokens)) for one in requests}


@given(workloads())
def test_every_workload_ends_whatever_is_scarce(
    workload: tuple[Limits, list[Request], dict[int, int]],
) -> None:
    drive(*workload)


def test_a_request_waits_for_pages_and_then_runs() -> None:
    limits = replace(ROOMY, num_pages=1 + 5)
    requests = [request(0, 9, 8), request(1, 9, 8)]  # 4 pages each: 5 hold one whole and a part
    steps = drive(limits, requests, {0: 8, 1: 8})
    assert any(len(step.counts) == 2 for step in steps)
    waits = [step for step in steps if list(step.counts) == [0]]
    assert waits, "the second never waited: the pages were not scarce"
    assert len(steps) > len(drive(ROOMY, requests, {0: 8, 1: 8}))


def test_the_next_request_takes_the_slot_and_pages_of_one_that_ended() -> None:
    limits = replace(ROOMY, num_slots=2, num_pages=1 + 3)
    steps = drive(limits, [request(0, 5, 4), request(1, 5, 4)], {0: 2, 1: 2})
    used = [(step.inputs.slot.tolist(), sorted(set(step.inputs.page_table.flat) - {0})) for step in steps]
    assert used == [([1], [1, 2])] * 4


def test_prompts_come_in_pieces_beside_tokens_that_decode() -> None:
    steps = drive(ROOMY, [request(0, 3, 6), request(1, 40, 1)], {0: 6, 1: 1})
    assert [step.counts for step in steps[:4]] == [{0: 3, 1: 13}, {0: 1, 1: 15}, {0: 1, 1: 12}, {0: 1}]


def test_who_decodes_gets_a_token_in_every_step_of_a_long_prompt() -> None:
    limits = replace(ROOMY, max_tokens=4)
    steps = drive(limits, [request(0, 1, 9), request(1, 20, 1)], {0: 9, 1: 1})
    assert [step.counts for step in steps[:7]] == [{0: 1, 1: 3}] * 6 + [{0: 1, 1: 2}]


def test_nothing_is_padded() -> None:
    (first, *_) = drive(ROOMY, [request(0, 5, 1), request(1, 2, 1)], {0: 1, 1: 1})
    assert first.inputs.page_table.shape == (2, 2)
    assert len(first.inputs.input_ids) == first.inputs.query_start[-1] == 7


@pytest.mark.parametrize(
    ("one", "message"),
    [
        (request(0, 60, 5), "needs room for 65 tokens, a sequence has 64"),
        (request(0, 40, 1), "needs 10 pages, the session has 9"),
        (request(0, 0, 5), "has 0 tokens and asks for 5"),
        (request(0, 5, 0), "has 5 tokens and asks for 0"),
    ],
)
def test_a_request_that_could_never_run_is_refused_at_once(one: Request, message: str) -> None:
    scheduler = Scheduler(replace(ROOMY, num_pages=10))
    with pytest.raises(UsageError, match=message):
        scheduler.submit(one)
    assert scheduler.is_done
