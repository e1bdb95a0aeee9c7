"""The scheduler feeds every token of every request once and in order, within its limits, and always ends."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import NamedTuple

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from nemotrt.exporter.errors import UsageError
from nemotrt.exporter.generation.scheduler import Request, Scheduler
from nemotrt.exporter.runtime.manifest import Profile
from nemotrt.exporter.runtime.step import StepInputs, check_step, pages_of

PROFILE = Profile("onnx", "", max_tokens=16, max_sequences=4, max_context=64, page_size=4)


@dataclass(frozen=True)
class Limits:
    profile: Profile = PROFILE
    num_slots: int = 5
    num_pages: int = 99


ROOMY = Limits()


class RecordedStep(NamedTuple):
    inputs: StepInputs
    counts: dict[int, int]
    """The number of tokens of each request in the step."""


def token_of(number: int, position: int) -> int:
    """The token that a request's stand-in model puts at a position: no two are alike."""
    return number * 1000 + position


def request(number: int, prompt: int, new: int) -> Request:
    return Request(number, tuple(token_of(number, i) for i in range(prompt)), new)


def drive(limits: Limits, requests: list[Request], ends_after: dict[int, int]) -> list[RecordedStep]:
    """Run all requests; `ends_after` is how many new tokens a request really makes. Checks every step."""
    scheduler = Scheduler(limits.profile, num_slots=limits.num_slots, num_pages=limits.num_pages)
    for one in requests:
        scheduler.submit(one)
    seen: dict[int, list[int]] = {one.number: [] for one in requests}
    made = dict.fromkeys(seen, 0)
    steps = []
    while not scheduler.is_done:
        inputs, numbers = scheduler.next_step()
        check_step(
            inputs,
            vocab_size=10**9,
            num_slots=limits.num_slots,
            num_pages=limits.num_pages,
            page_size=limits.profile.page_size,
        )
        assert 1 <= len(inputs.input_ids) <= limits.profile.max_tokens
        assert len(inputs.slot) <= limits.profile.max_sequences
        counts = {}
        for b, chunk in enumerate(np.split(inputs.input_ids, inputs.query_start[1:-1])):
            number = int(chunk[0]) // 1000
            counts[number] = len(chunk)
            assert inputs.context_len[b] == len(seen[number])
            seen[number] += chunk.tolist()
        steps.append(RecordedStep(inputs, counts))
        assert tuple(int(inputs.input_ids[row]) // 1000 for row in inputs.logits_row) == numbers
        new, ended = {}, []
        for one in requests:
            if one.number in numbers:
                new[one.number] = token_of(one.number, len(one.prompt) + made[one.number])
                made[one.number] += 1
                if made[one.number] == ends_after[one.number]:
                    ended.append(one.number)
        scheduler.complete(new, ended)
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
        Profile("onnx", "", max_sequences + draw(st.integers(0, 12)), max_sequences, 42, page_size),
        num_slots=draw(st.integers(2, 6)),
        num_pages=1 + max(1, largest) + draw(st.integers(0, 10)),
    )
    return limits, requests, {one.number: draw(st.integers(1, one.max_new_tokens)) for one in requests}


@given(workloads())
def test_every_workload_ends_whatever_is_scarce(
    workload: tuple[Limits, list[Request], dict[int, int]],
) -> None:
    drive(*workload)


def test_a_request_waits_until_all_its_pages_are_free() -> None:
    requests = [request(0, 9, 8), request(1, 9, 8)]  # 4 pages each
    scarce = drive(replace(ROOMY, num_pages=1 + 7), requests, {0: 8, 1: 8})
    assert [number for step in scarce for number in step.counts] == [0] * 8 + [1] * 8
    enough = drive(replace(ROOMY, num_pages=1 + 8), requests, {0: 8, 1: 8})
    assert enough[0].counts.keys() == {0, 1}


def test_pages_of_a_request_that_ends_early_are_free_again() -> None:
    requests = [request(0, 9, 8), request(1, 9, 8)]
    steps = drive(replace(ROOMY, num_pages=1 + 4), requests, {0: 1, 1: 1})
    assert [step.inputs.page_table.tolist() for step in steps] == [[[1, 2, 3]], [[1, 2, 3]]]


def test_the_next_request_takes_the_slot_and_pages_of_one_that_ended() -> None:
    limits = replace(ROOMY, num_slots=2, num_pages=1 + 3)
    steps = drive(limits, [request(0, 5, 4), request(1, 5, 4)], {0: 2, 1: 2})
    used = [(step.inputs.slot.tolist(), sorted(set(step.inputs.page_table.flat) - {0})) for step in steps]
    assert used == [([1], [1, 2])] * 4


def test_prompts_come_in_pieces_beside_tokens_that_decode() -> None:
    steps = drive(ROOMY, [request(0, 3, 6), request(1, 40, 1)], {0: 6, 1: 1})
    assert [step.counts for step in steps[:4]] == [{0: 3, 1: 13}, {0: 1, 1: 15}, {0: 1, 1: 12}, {0: 1}]


def test_who_decodes_gets_a_token_in_every_step_of_a_long_prompt() -> None:
    limits = replace(ROOMY, profile=replace(PROFILE, max_tokens=4))
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
    scheduler = Scheduler(PROFILE, num_slots=5, num_pages=10)
    with pytest.raises(UsageError, match=message):
        scheduler.submit(one)
    assert scheduler.is_done
