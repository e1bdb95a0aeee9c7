"""An engine's profiles hold what the flags promise, and one that holds no sequence is refused."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nemotrt.exporter.config import BuildConfig
from nemotrt.exporter.engines.shape_profiles import check_holds_one, engine_profiles, max_rows
from nemotrt.exporter.errors import CompileError


def config(**changes: int) -> BuildConfig:
    return BuildConfig(Path("checkpoint"), Path("bundle"), **changes)


@given(
    st.integers(1, 4096), st.integers(1, 300), st.integers(1, 1 << 20), st.sampled_from([1, 64, 128, 1024])
)
def test_every_promise_is_kept(tokens: int, sequences: int, context: int, page_size: int) -> None:
    sequences = min(tokens, sequences)
    built = config(max_tokens=tokens, max_sequences=sequences, max_context=context, page_size=page_size)
    decode, prefill, mixture = engine_profiles(built)
    assert (decode.name, prefill.name, mixture.name) == ("decode", "prefill", "mixture")
    assert decode.axes["T"][2] == decode.axes["B"][2] == sequences
    assert prefill.axes["B"][2] == 1
    assert (mixture.axes["T"][2], mixture.axes["B"][2]) == (tokens, sequences)
    pages = -(-context // page_size)
    for profile in (decode, prefill, mixture):
        assert profile.axes["M"][2] == pages
        assert profile.axes["K"][2] == 1 + sequences * pages
        assert profile.axes["S"][2] == 1 + sequences
        assert profile.axes["R"][2] >= min(sequences, profile.axes["B"][2])
        assert profile.axes["B+1"] == tuple(size + 1 for size in profile.axes["B"])
    assert max_rows(built) == mixture.axes["R"][2]


def test_shapes_are_read_off_axes() -> None:
    decode, _, mixture = engine_profiles(config(max_tokens=32, max_sequences=4, max_context=256))
    assert decode.shapes(("B", "M")) == ((1, 1), (4, 2), (4, 2))
    assert mixture.shapes(("S", 128, 3)) == ((2, 128, 3), (5, 128, 3), (5, 128, 3))
    assert mixture.shapes(("T",)) == ((1,), (16,), (32,))


def test_an_unknown_axis_is_named() -> None:
    with pytest.raises(CompileError, match="axis W, which no engine profile bounds"):
        engine_profiles(config())[0].shapes(("T", "W"))


@pytest.mark.parametrize(
    ("axis", "most", "flag"),
    [("K", 64, "--max-context"), ("M", 63, "--max-context"), ("S", 1, "--max-sequences")],
)
def test_a_profile_that_holds_no_sequence_is_refused(axis: str, most: int, flag: str) -> None:
    built = config()  # 8192 tokens are 64 pages, and page 0 is nobody's
    profile = engine_profiles(built)[0]
    small = dataclasses.replace(profile, axes=profile.axes | {axis: (1, 1, most)})
    with pytest.raises(
        CompileError, match=f"at most {most} of axis {axis}; one sequence of 8192 tokens"
    ) as caught:
        check_holds_one(small, built)
    assert flag in caught.value.hint
