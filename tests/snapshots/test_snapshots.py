"""What is kept in the repository is what the code writes: the help, the example's graph, the manifest's schema."""

from __future__ import annotations

import difflib

import pytest
from texts import ROOT, TEXTS


@pytest.mark.parametrize("name", TEXTS)
def test_a_kept_text_is_what_the_code_writes(name: str) -> None:
    kept = (ROOT / name).read_text(encoding="utf-8").splitlines()
    written = TEXTS[name]().splitlines()
    difference = list(difflib.unified_diff(kept, written, "kept", "written", lineterm="", n=1))
    shown = "\n".join(difference[:40])
    assert not difference, f"{name} is not what the code writes; if that is meant: make snapshots\n{shown}"
