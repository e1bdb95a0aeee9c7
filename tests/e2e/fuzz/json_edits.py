"""JSON files with random edits: of values, of keys, of structure and of bytes."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from typing import Any

from hypothesis import strategies as st

Draw = Callable[[st.SearchStrategy[Any]], Any]

NUMBERS = st.one_of(
    st.integers(-2, 9),
    st.sampled_from(
        [128, 10**6, 2**31 - 1, 2**31, 2**32, 2**63 - 1, 2**63, 2**64, 10**30, 10**400, -(2**63)]
    ),
    st.sampled_from([0.0, -0.0, 0.5, 1e-45, 1e39, 1e308, float("nan"), float("inf"), float("-inf")]),
)

TEXTS = st.one_of(
    st.text(st.characters(), max_size=6),
    st.sampled_from(
        [
            "",
            ".",
            "..",
            "../x",
            "a/b",
            "/",
            "\0",
            "\ud800",
            "\x1b[31m",
            "x\ny",
            "name" * 100,
            "ﬀ",
            "float32",
            "fp8",
        ]
    ),
)

SCALARS = st.one_of(st.none(), st.booleans(), NUMBERS, TEXTS)

VALUES = st.one_of(
    SCALARS, st.lists(SCALARS, max_size=3), st.dictionaries(TEXTS, SCALARS, max_size=3), st.just([[[[{}]]]])
)
"""Any JSON value, mostly of a kind or a size that a field does not expect."""


@st.composite
def edited(draw: Draw, document: Any) -> bytes:
    """The text of the document after one to three edits, sometimes with damaged bytes."""
    document = copy.deepcopy(document)
    for _ in range(draw(st.integers(1, 3))):
        _edit(draw, document)
    text = json.dumps(document).encode()
    return bytes(draw(damaged(text))) if draw(st.integers(0, 5)) == 0 else text


def _edit(draw: Draw, container: Any) -> None:
    """One edit, at any depth."""
    while container:
        key = draw(st.sampled_from(range(len(container)) if isinstance(container, list) else list(container)))
        if isinstance(container[key], list | dict) and container[key] and draw(st.booleans()):
            container = container[key]
            continue
        _change(draw, container, key)
        return


def _change(draw: Draw, container: Any, key: Any) -> None:
    """Change one entry of a list or an object."""
    action = draw(st.sampled_from(["remove", "replace", "adjust", "adjust", "add", "swap", "wrap"]))
    if action == "remove":
        del container[key]
    elif action == "replace":
        container[key] = draw(VALUES)
    elif action == "adjust":
        container[key] = _adjusted(draw, container[key])
    elif action == "wrap":
        container[key] = draw(st.sampled_from([[container[key]], {"x": container[key]}, str(container[key])]))
    elif action == "swap":
        other = draw(
            st.sampled_from(range(len(container)) if isinstance(container, list) else list(container))
        )
        container[key], container[other] = container[other], container[key]
    elif isinstance(container, list):
        container.insert(key, draw(st.one_of(st.just(container[key]), VALUES)))
    else:
        container[draw(TEXTS)] = draw(st.one_of(st.just(container[key]), VALUES))


def _adjusted(draw: Draw, value: Any) -> Any:
    """A value of the same kind that is near, or far."""
    if isinstance(value, bool):
        return not value
    if isinstance(value, int | float):
        return draw(st.one_of(st.sampled_from([value + 1, value - 1, value * 2, -value]), NUMBERS))
    if isinstance(value, str):
        near = [value + "x", value[:-1], value[1:], value + value, value.upper(), f" {value}"]
        return draw(st.one_of(st.sampled_from(near), TEXTS))
    return draw(VALUES)


@st.composite
def damaged(draw: Draw, text: bytes) -> bytes:
    """The text with some bytes removed or replaced, or in another encoding."""
    position = draw(st.integers(0, len(text)))
    rest = text[position:]
    inserted = [
        b"\xff",
        b"\0",
        b",",
        b"}",
        b'"',
        b"1" * 5000,
        b"[" * 100_000,
        b"NaN",
        b"\\ud800",
        b'{"a":1,"a":1}',
    ]
    others = [
        text[:position],
        text[:position] + rest[draw(st.integers(1, 9)) :],
        text[:position] + draw(st.sampled_from(inserted)) + rest,
        text.replace(b"{", b'{"x": 1, "x": 2, ', 1),
        b"\xef\xbb\xbf" + text,
        text.decode("utf-8", "replace").encode("utf-16"),
    ]
    return bytes(draw(st.sampled_from(others)))
