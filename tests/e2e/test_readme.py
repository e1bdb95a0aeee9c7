"""The README's console blocks, run in their order in a copy of the example, and compared with what they show.

A line `…` stands for any lines. Numbers are not compared, since seconds and processors differ, nor is how far columns
stand apart; a command whose output holds a line `error:` must fail, every other one must not.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PAGES = ("README.md", "CONTRIBUTING.md")
PATIENCE = 300.0

NOT_RUN = {
    "make demo": "sets up an environment from PyPI; its three commands are the README's own",
    "make test": "runs this test",
    "make setup": "sets up an environment from PyPI",
    "make lint types imports": "runs beside the tests",
    "pip install 'nemo-export[build,cpu]'": "the package that scripts/check_packages.py builds and tries",
    "nemo-export build examples/tiny --output rtx.bundle": "compiles for minutes; test_engine.py builds engines",
}
"""A command of a console block → why no test runs it here."""

DRAWN = re.compile(r"^nemo-export generate ")
"""Its text may part from the README's where two tokens are equally likely: only the prompt must be there."""


@dataclass(frozen=True)
class Command:
    """One line after `$`, and the lines under it."""

    line: str
    shown: tuple[str, ...]

    @property
    def fails(self) -> bool:
        return any(text.startswith("error: ") for text in self.shown)


def commands(page: str) -> list[Command]:
    """The page's commands in their order."""
    found = []
    for block in re.findall(r"^```console\n(.*?)^```", (ROOT / page).read_text(), re.DOTALL | re.MULTILINE):
        for part in re.split(r"^\$ ", block, flags=re.MULTILINE)[1:]:
            line, *shown = part.rstrip("\n").split("\n")
            found.append(Command(line, tuple(shown)))
    return found


def plain(text: str) -> str:
    """The text without what differs between machines: numbers, hashes, the width of columns."""
    text = re.sub(r"\b[0-9a-f]{64}\b", "#", text)
    text = re.sub(r"\d[\d,.]*(?:e[+-]?\d+)?", "#", text)
    return re.sub(r"─+", "─", " ".join(text.split()))


def missing(shown: tuple[str, ...], printed: str) -> str:
    """The first shown line that was not printed where it stands, or nothing."""
    lines = iter([plain(line) for line in printed.splitlines()])
    anywhere = False
    for line in shown:
        if line == "…":
            anywhere = True
            continue
        wanted = plain(line)
        if anywhere:
            if wanted not in lines:  # takes the lines before it too
                return line
        elif next(lines, None) != wanted:
            return line
        anywhere = False
    return "" if anywhere or not any(lines) else "the output's end"


@pytest.mark.slow
def test_the_readme_s_commands_do_what_it_shows(tmp_path: Path) -> None:
    shutil.copytree(ROOT / "examples", tmp_path / "examples")
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    ran = 0
    for command in commands("README.md"):
        if command.line in NOT_RUN:
            continue
        done = subprocess.run(
            ["bash", "-c", command.line],
            cwd=tmp_path,
            env=os.environ | {"PATH": path},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=PATIENCE,
            check=False,
        )
        assert (done.returncode != 0) == command.fails, f"$ {command.line}\n{done.stdout}"
        if DRAWN.match(command.line):
            assert done.stdout.startswith(command.shown[0].rpartition(" to ")[0])
        else:
            lacking = missing(command.shown, done.stdout)
            assert not lacking, f"$ {command.line}\nshows: {lacking}\nprinted:\n{done.stdout}"
        ran += 1
    assert ran >= 9


def test_what_is_not_run_stands_in_a_page() -> None:
    lines = {command.line for page in PAGES for command in commands(page)}
    assert set(NOT_RUN) <= lines
    unknown = {command.line for command in commands("CONTRIBUTING.md")} - set(NOT_RUN)
    assert not unknown, "say why in NOT_RUN"


@pytest.mark.parametrize(
    ("shown", "printed", "lacking"),
    [
        (("load  0.1 s", "done"), "load      12.0 s\ndone\n", ""),
        (("…", "done"), "a\nb\ndone\n", ""),
        (("a", "…"), "a\nb\n", ""),
        (("done", "…"), "a\ndone\n", "done"),
        (("…", "done"), "a\nb\n", "done"),
        (("a",), "a\nb\n", "the output's end"),
        (("b", "…", "a", "…"), "b\nc\n", "a"),
    ],
)
def test_a_page_that_shows_something_else_is_seen(shown: tuple[str, ...], printed: str, lacking: str) -> None:
    assert missing(shown, printed) == lacking


@pytest.mark.parametrize(
    "page", [*PAGES, "docs/architecture.md", "docs/performance.md", "examples/tiny/README.md"]
)
def test_every_link_leads_to_something(page: str) -> None:
    folder = (ROOT / page).parent
    for target in re.findall(r"\]\(([^)#]+)(?:#[^)]*)?\)", (ROOT / page).read_text()):
        if "://" not in target:
            assert (folder / target).exists(), f"{page} links to {target}"
