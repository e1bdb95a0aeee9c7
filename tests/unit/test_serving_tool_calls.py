"""Tool calls are found in the same way however an answer is cut into pieces, and broken ones stay text."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from text_pieces import cut

from nemotrt.exporter.serving.json_schema import typed_value
from nemotrt.exporter.serving.tool_calls import ToolCallStream

SCHEMA: dict[str, Any] = {
    "type": "object",
    "properties": {
        "city": {"type": "string"},
        "days": {"type": "integer"},
        "ratio": {"type": ["number", "null"]},
        "metric": {"type": "boolean"},
        "hours": {"type": "array", "items": {"type": "integer"}},
        "place": {"$ref": "#/$defs/place"},
        "either": {"anyOf": [{"type": "string"}, {"type": "integer"}]},
        "level": {"enum": [1, 2, "high"]},
        "loop": {"$ref": "#/properties/loop"},
        "broken": {"type": 7, "enum": 3, "anyOf": {}, "$ref": 1},
        "free": {},
    },
    "$defs": {"place": {"type": "object"}},
}
TOOLS = [
    {"type": "function", "function": {"name": "weather", "parameters": SCHEMA}},
    {"type": "function", "function": {"name": "stop"}},
]


def markup(name: str, values: dict[str, str]) -> str:
    """A call as the chat template writes it."""
    parameters = "".join(f"<parameter={key}>\n{value}\n</parameter>\n" for key, value in values.items())
    return f"<tool_call>\n<function={name}>\n{parameters}</function>\n</tool_call>"


def parse(pieces: list[str]) -> tuple[str, list[tuple[str, dict[str, Any]]]]:
    stream = ToolCallStream(TOOLS)
    parts = [*(stream.push(piece) for piece in pieces), stream.end()]
    calls = [(call.name, json.loads(call.arguments)) for part in parts for call in part.calls]
    return "".join(part.content for part in parts), calls


OSLO = markup("weather", {"city": "Oslo", "days": "3"})
OSLO_CALL = ("weather", {"city": "Oslo", "days": 3})

ANSWERS = {
    "one call": (OSLO, "", [OSLO_CALL]),
    "text, then calls": (f"I look. \n\n{OSLO}\n{markup('stop', {})}\n", "I look.", [OSLO_CALL, ("stop", {})]),
    "text after a call": (f"{OSLO} \ndone ", "done ", [OSLO_CALL]),
    "no line breaks": (OSLO.replace("\n", ""), "", [OSLO_CALL]),
    "a value of several lines": (
        markup("weather", {"city": "\na\n\n<b> c</d>\n"}),
        "",
        [("weather", {"city": "\na\n\n<b> c</d>\n"})],
    ),
    "a call in a value": (markup("weather", {"city": OSLO.partition("<param")[0]}), "", None),
    "an unknown tool": (markup("other", {"x": "1"}), "", [("other", {"x": "1"})]),
    "an empty value": (markup("weather", {"city": ""}), "", [("weather", {"city": ""})]),
}
"""An answer, its content, its calls; None for calls that the test does not compare."""

BROKEN = {
    "cut off in a value": OSLO.partition("slo")[0],
    "cut off before the last tag": OSLO.removesuffix("</tool_call>"),
    "no function": "a \n<tool_call>\n{}\n</tool_call>\n",
    "no name": markup(" ", {}),
    "a name of two lines": markup("a\nb", {}),
    "a tag in a name": markup("a<b>", {}),
    "text between parameters": OSLO.replace("</parameter>\n", "</parameter>\nx", 1),
    "no end of the function": OSLO.replace("</function>", ""),
    "a parameter twice": OSLO.replace("=days", "=city"),
    "the tag alone": "<tool_call>",
    "half of a tag": "a <tool_c",
    "no call": " 1 < 2\n",
}


@pytest.mark.parametrize("case", ANSWERS)
def test_calls_are_found(case: str) -> None:
    text, content, calls = ANSWERS[case]
    found = parse([text])
    assert found[0] == content
    assert calls is None or found[1] == calls
    assert parse(list(text)) == found


@pytest.mark.parametrize("case", BROKEN)
def test_broken_markup_stays_text(case: str) -> None:
    text = BROKEN[case]
    assert parse([text]) == (text, [])
    assert parse(list(text)) == (text, [])


@pytest.mark.parametrize(
    "case", ["no function", "no name", "text between parameters", "a parameter twice", "the tag alone"]
)
def test_a_call_after_a_broken_one_is_found(case: str) -> None:
    content, calls = parse([BROKEN[case] + OSLO])
    assert content.rstrip() == BROKEN[case].rstrip()
    assert calls == [OSLO_CALL]


WORDS = [
    "<tool_call>",
    "</tool_call>",
    "<function=a>",
    "</function>",
    "<parameter=b>",
    "</parameter>",
    "<",
    ">",
    " ",
    "\n",
    "a",
]
ANSWER = st.lists(st.sampled_from([*WORDS, OSLO, OSLO[:50], OSLO[12:]]), max_size=12).map("".join)


@given(st.data())
def test_pieces_make_no_difference(data: st.DataObject) -> None:
    text = data.draw(ANSWER)
    assert parse(cut(data, text)) == parse([text])


VALUE = st.text(st.characters(exclude_categories=["Cs"])).filter(lambda text: "</parameter>" not in text)


@given(st.dictionaries(st.sampled_from(["city", "free", "unknown"]), VALUE))
def test_text_arrives_as_it_was_written(values: dict[str, str]) -> None:
    assert parse([markup("weather", values)]) == ("", [("weather", values)])


def test_text_is_passed_on_at_once_and_a_call_when_it_is_complete() -> None:
    stream = ToolCallStream(TOOLS)
    parts = [stream.push(piece) for piece in ["I look", ". \n", OSLO[:-1], ">", "\n"]]
    assert [part.content for part in parts] == ["I look", ".", "", "", ""]
    assert [len(part.calls) for part in parts] == [0, 0, 0, 1, 0]
    assert not stream.end().content


@pytest.mark.parametrize(
    ("parameter", "text", "value"),
    [
        ("city", "5", "5"),
        ("city", '"quoted"', '"quoted"'),
        ("days", "5", 5),
        ("days", "5.0", 5),
        ("days", "5.5", "5.5"),
        ("days", "many", "many"),
        ("days", "true", "true"),
        ("ratio", "5", 5),
        ("ratio", "-1e3", -1000.0),
        ("ratio", "null", None),
        ("ratio", "NaN", "NaN"),
        ("ratio", "1e999", "1e999"),
        ("ratio", "1" * 5000, "1" * 5000),
        ("metric", "True", True),
        ("metric", "1", "1"),
        ("hours", "[1, 2]", [1, 2]),
        ("hours", '["\\ud800"]', '["\\ud800"]'),
        ("hours", "[" * 100_000, "[" * 100_000),
        ("place", '{"x": 1}', {"x": 1}),
        ("place", "[1]", "[1]"),
        ("either", "5", 5),
        ("either", "five", "five"),
        ("level", "2", 2),
        ("level", "high", "high"),
        ("loop", "1", "1"),
        ("broken", "1", "1"),
        ("free", "1", "1"),
        ("unknown", "1", "1"),
    ],
)
def test_a_value_gets_its_declared_type(parameter: str, text: str, value: Any) -> None:
    typed = typed_value(text, SCHEMA, parameter)
    assert (typed, type(typed)) == (value, type(value))
