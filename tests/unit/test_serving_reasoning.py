"""An answer is split into reasoning and content in the same way however its text is cut into pieces."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st
from text_pieces import cut

from nemotrt.exporter.serving.reasoning import ReasoningStream, opens_reasoning

THINK = "<think>\nWhat is 1+1?\n\nTwo.\n</think>\n\nIt is 2.\n"

ANSWERS = {
    "both": (False, THINK, "What is 1+1?\n\nTwo.", "It is 2.\n"),
    "opened in the prompt": (True, "Two.\n</think>\nIt is 2.", "Two.", "It is 2."),
    "opened in both": (True, "\n" + THINK, "What is 1+1?\n\nTwo.", "It is 2.\n"),
    "closed in the prompt": (False, "\nIt is <2 > 1.", "", "\nIt is <2 > 1."),
    "empty reasoning": (False, "<think></think>2", "", "2"),
    "empty content": (True, "a </think> ", "a", ""),
    "never closed": (True, "\n one < two </think ", "one < two </think", ""),
    "never closed, opened in the answer": (False, " <think> one\n", "one", ""),
    "nothing": (True, "", "", ""),
    "a tag that is cut off": (False, "<thi", "", "<thi"),
    "a tag that is cut off, opened in the prompt": (True, "<thi", "<thi", ""),
    "a second tag in the reasoning": (False, "<think>a<think>b</think>c", "a<think>b", "c"),
    "tags in the content": (False, "<think>a</think>b<think>c</think>", "a", "b<think>c</think>"),
    "a closing tag alone": (False, "a</think>b", "", "a</think>b"),
    "a call in the content": (True, "a</think>\n<tool_call>\n", "a", "<tool_call>\n"),
}
"""Whether the prompt opens the reasoning, the answer, its reasoning, its content."""


def split(pieces: list[str], *, is_open: bool) -> tuple[str, str]:
    stream = ReasoningStream(is_open=is_open)
    parts = [*(stream.push(piece) for piece in pieces), stream.end()]
    return "".join(part.reasoning for part in parts), "".join(part.content for part in parts)


@pytest.mark.parametrize("case", ANSWERS)
def test_an_answer_is_split(case: str) -> None:
    is_open, text, reasoning, content = ANSWERS[case]
    assert split([text], is_open=is_open) == (reasoning, content)
    assert split(list(text), is_open=is_open) == (reasoning, content)


ANSWER = st.lists(st.sampled_from(["<think>", "</think>", "<", "think", " ", "\n", "a", "é"])).map("".join)


@given(st.data(), st.booleans())
def test_pieces_make_no_difference(data: st.DataObject, is_open: bool) -> None:
    text = data.draw(ANSWER)
    assert split(cut(data, text), is_open=is_open) == split([text], is_open=is_open)


def test_text_is_passed_on_at_once() -> None:
    stream = ReasoningStream(is_open=True)
    pieces = [
        (part.reasoning, part.content) for part in map(stream.push, ["one", " two", "</", "think>", "x", " "])
    ]
    assert pieces == [("one", ""), (" two", ""), ("", ""), ("", ""), ("", "x"), ("", " ")]


def test_a_prompt_opens_the_reasoning() -> None:
    assert opens_reasoning("<|im_start|>assistant\n<think>\n")
    assert not opens_reasoning("<|im_start|>assistant\n<think></think>")
    assert not opens_reasoning("<think>a</think>b<|im_start|>assistant\n")
