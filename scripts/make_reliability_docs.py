#!/usr/bin/env python3
"""Writes docs/reliability.md from the cases of the tests of bad input, interrupts and streams."""

from __future__ import annotations

import inspect
import itertools
import re
import sys
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from types import ModuleType
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
PAGE = ROOT / "docs" / "reliability.md"
sys.path[:0] = [str(ROOT / "tests"), str(ROOT / "tests" / "e2e")]

import bad_bundles  # noqa: E402  (the folders above are not packages)
import bad_checkpoints  # noqa: E402
import bad_fp8  # noqa: E402
import bad_machines  # noqa: E402
import bad_places  # noqa: E402
import bad_reference_files  # noqa: E402
import bad_text_files  # noqa: E402
import test_bad_input  # noqa: E402
import test_bad_machines  # noqa: E402
import test_bad_places  # noqa: E402
import test_fuzz  # noqa: E402
import test_interrupts  # noqa: E402
import test_streams  # noqa: E402

MODULES = (test_bad_input, test_bad_places, test_bad_machines, test_interrupts, test_streams, test_fuzz)

HEAD = """\
<!-- Written by scripts/make_reliability_docs.py from the tests' own tables: change a case, then `make snapshots`. -->

# Reliability

{total} cases, each of them a test (`pytest tests/e2e`).
*Refused* means: one line that begins with `error:`, at most one line of advice, the exit code shown, and no traceback.
All of the user's files are unchanged afterwards, and no other file exists. In an error message, `…` stands for any text
and `N` for any number. `make fuzz` tries hundreds of random files and arguments of each kind; the tests try
a few.
"""

Refusal = tuple[str, int]
"""Pattern of the error message, and the exit code."""

REFUSALS: Mapping[Callable[..., None], Mapping[str, Refusal]] = {
    test_bad_input.test_a_bad_checkpoint: {
        name: (case.says, case.code) for name, case in bad_checkpoints.ALL.items()
    },
    test_bad_input.test_a_bad_quantization: {
        name: (case.says, case.code) for name, case in bad_fp8.ALL.items()
    },
    test_bad_input.test_a_bad_tokenizer_or_chat_template: {
        name: (case.says, case.code) for name, case in bad_text_files.ALL.items()
    },
    test_bad_input.test_invalid_flags: {name: (says, 2) for name, (_, says) in bad_places.FLAGS.items()},
    test_bad_places.test_an_unusable_output_path: {
        name: (says, 2) for name, (_, _, says) in bad_places.PLACES.items()
    },
    test_bad_input.test_a_bad_bundle: {name: (says, 7) for name, (_, says) in bad_bundles.ALL.items()},
    test_bad_input.test_an_invalid_evaluation_text: {
        name: (says, 2) for name, (_, _, says) in bad_bundles.EVALS.items()
    },
    test_bad_input.test_a_bad_reference_file: {
        name: (says, code) for name, (_, says, code) in bad_reference_files.ALL.items()
    },
    test_bad_input.test_an_unusable_path_for_a_reference_file: {
        name: (says, 2) for name, (_, says) in bad_reference_files.PLACES.items()
    },
    test_bad_input.test_bundles_that_cannot_be_compared: {
        name: (says, 2) for name, (_, says) in bad_reference_files.AGAINST.items()
    },
    test_bad_input.test_an_invalid_prompt: {
        name: (says, 2) for name, (_, says) in bad_bundles.PROMPTS.items()
    },
    test_bad_machines.test_a_package_that_is_missing_or_broken: {
        name: (says, 2) for name, (_, _, _, says) in bad_machines.PACKAGES.items()
    },
    test_bad_machines.test_too_few_addresses: {
        name: (says, 2) for name, (_, _, says) in bad_machines.ADDRESSES.items()
    },
}
"""Test → case → refusal."""


def page() -> str:
    """The text of docs/reliability.md."""
    sections, singles, total = [], [], 0
    for test in itertools.chain.from_iterable(map(_tests, MODULES)):
        ids = list(_ids(test))
        total += max(1, len(ids))
        if ids:
            sections.append(_section(test, ids))
        else:
            singles.append(f"| {_words(test.__name__)} | {_sentence(test)} |\n")
    alone = "## Other cases\n\n| case | result |\n|---|---|\n" + "".join(singles)
    return "\n".join([HEAD.format(total=total), *sections, alone])


def _tests(module: ModuleType) -> Iterator[Callable[..., None]]:
    for name, member in vars(module).items():
        if name.startswith("test_") and inspect.isfunction(member):
            yield member


def _ids(test: Callable[..., None]) -> Iterator[str]:
    """The ids that pytest gives the cases; none if there is only one."""
    marks = [mark for mark in getattr(test, "pytestmark", ()) if mark.name == "parametrize"]
    if marks:
        for case in itertools.product(*(_values(*mark.args, **mark.kwargs) for mark in marks)):
            yield "-".join(case)


def _values(_: str, values: Any, ids: Any = None) -> list[str]:
    return [str(value) for value in (ids or values)]


def _section(test: Callable[..., None], ids: list[str]) -> str:
    title = f"## {_words(test.__name__).capitalize()} ({len(ids)})\n\n{_sentence(test)}\n\n"
    refusals = REFUSALS.get(test)
    if refusals is None:
        return title + "| case |\n|---|\n" + "".join(f"| {_words(case)} |\n" for case in ids)
    rows = [f"| {_words(case)} | {refusals[case][1]} | `{_readable(refusals[case][0])}` |\n" for case in ids]
    return title + "| case | exit | error message |\n|---|---|---|\n" + "".join(rows)


def _words(name: str) -> str:
    return name.removeprefix("test_").replace("_", " ").replace("-", " ")


def _sentence(test: Callable[..., None]) -> str:
    if not test.__doc__:
        raise SystemExit(f"{test.__name__} has no docstring; {PAGE.name} needs one")
    return " ".join(test.__doc__.split())


def _readable(pattern: str) -> str:
    """A regular expression as readable text."""
    return re.sub(r"\\(.)", r"\1", pattern.replace(r"\d+", "N").replace(".*", "…").replace("|", r"\|"))


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
