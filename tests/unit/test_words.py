"""Retired words stay out of the product's text: one term for one thing, in American spelling."""

from __future__ import annotations

import re
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
FOLDERS = ("exporter", "model", "plugins", "scripts", "docs")
SUFFIXES = {".py", ".md", ".html", ".cpp", ".h", ".txt", ".toml"}
EXEMPT = {
    "exporter/quantization/texts": "calibration text, as it was published",
    "docs/report.svg": "generated",
}
"""A path's beginning → why its words are not ours."""

RETIRED = {
    r"twins?\b": "FP32 emulation",
    r"(?:an?|another|by|each|no|of|the|this) goldens?\b(?! checkpoint)|goldens\b": "reference file",
    r"(?<!_)floors?\b(?!\()": "rounding baseline",
    r"proved\b|unproved": "validated",
    r"(?:un|de)?quantis\w*": "quantiz…",
    r"(?:un)?optimis\w*": "optimiz…",
    r"initialis\w*": "initializ…",
    r"normalis\w*": "normaliz…",
    r"recognis\w*": "recogniz…",
    r"licences?\b": "license",
    r"colours?\b": "color",
    r"stray writes?": "out-of-bounds writes",
    r"departs?\b|departing\b": "diverges",
    r"same best token": "top-1 agreement",
    r"other best token": "top-1 disagreement",
    r"flip'?s? margin": "top-1 mismatch margin",
    r"surprises?\b": "negative log-likelihood",
    r"prefill\S* in pieces": "chunked prefill",
    r"led graph|chosen otherwise|as it is told": "forced routing",
    r"rerouted\b": "routing mismatches",
    r"suspects?\b": "divergent value",
    r"\bbeside the": "against, next to",
    r"hears? of": "is called with",
    r"stands? in for": "replaces",
    r"\bdearest\b": "most expensive, or max",
    r"out loud": "reported",
    r"\ba person\b": "a user",
    r"kept from the build before": "reused from the previous build",
    r"\bstrain\b": "fraction of limit used",
    r"of its checkpoint only": "a partial model: layers …",
}
"""Pattern, matched in any case → what is written in its place."""


@cache
def sources() -> tuple[Path, ...]:
    paths = [path for folder in FOLDERS for path in (ROOT / folder).rglob("*") if path.suffix in SUFFIXES]
    return tuple(
        path
        for path in sorted([*paths, ROOT / "README.md", ROOT / "CONTRIBUTING.md"])
        if not path.relative_to(ROOT).as_posix().startswith(tuple(EXEMPT))
    )


@cache
def lines() -> tuple[tuple[str, str], ...]:
    """Every line of the sources, with its place."""
    return tuple(
        (f"{path.relative_to(ROOT)}:{number}", line.strip())
        for path in sources()
        for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1)
    )


def uses(pattern: str) -> list[str]:
    retired = re.compile(rf"(?<![a-z])(?:{pattern})", re.IGNORECASE)
    return [f"{place}: {line[:100]}" for place, line in lines() if retired.search(line)]


def test_the_sources_are_there() -> None:
    assert {path.relative_to(ROOT).parts[0] for path in sources()} >= {*FOLDERS, "README.md"}


@pytest.mark.parametrize("pattern", RETIRED)
def test_a_retired_word_is_not_used(pattern: str) -> None:
    places = uses(pattern)
    assert not places, f"write {RETIRED[pattern]!r}:\n" + "\n".join(places)
