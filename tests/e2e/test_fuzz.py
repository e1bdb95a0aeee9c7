"""Random input: no internal error, no crash, no hang, and nothing of the user's touched.

`make fuzz` tries thousands; each run of the tests tries the same few.
"""

from __future__ import annotations

import json
import logging
import re
import shutil
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NoReturn

import pytest
from forks import Zygote
from fuzz import arguments, files
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from refusals import contents

from nemotrt.exporter.cli import program
from nemotrt.exporter.errors import CheckpointError

ROOT = Path(__file__).resolve().parents[2]

REFUSALS = range(2, 9)
"""Exit codes that docs/cli.md lists, other than success and a bug."""

BUILD = ("--runtime", "onnx", "--no-validate", "--max-context", "64", "--output", "out")

FEW = 4
"""Examples of each family that every run of the tests tries."""


@dataclass
class Commands:
    """Runs commands in a folder of their own, checks how each ends, and counts the outcomes."""

    zygote: Zygote
    folder: Path
    num_examples: int
    """How many random examples to try; 0 tries the same few."""
    outcomes: Counter[str] = field(default_factory=Counter)

    def explore(self, example: Callable[..., None], **strategies: st.SearchStrategy[Any]) -> None:
        """Call a function with many examples, each in an empty folder; that of the smallest failing one stays."""

        def isolated(**drawn: Any) -> None:
            shutil.rmtree(self.folder, ignore_errors=True)
            self.folder.mkdir(parents=True)
            example(**drawn)
            shutil.rmtree(self.folder)

        chosen = settings(
            max_examples=self.num_examples or FEW,
            derandomize=not self.num_examples,
            database=None,
            deadline=None,
            phases=(Phase.generate, Phase.shrink) if self.num_examples else (Phase.generate,),
            suppress_health_check=list(HealthCheck),
        )
        chosen(given(**strategies)(isolated))()

    def run(self, *command: str) -> int:
        """Run a command; an exit code that is documented, and for a refusal one line of error and no file."""
        stdout, stderr = (self.folder.with_suffix(f".{name}") for name in ("stdout", "stderr"))
        self.folder.with_suffix(".command").write_text(repr(command))
        before = contents(self.folder)
        code = self.zygote.run(*command, stdout=stdout, stderr=stderr, folder=self.folder).wait()
        lines = stderr.read_text().splitlines()
        assert code == 0 or code in REFUSALS, (command, code, lines)
        if code and not (command[0] == "verify" and code == 7):
            self._check_refusal(command, lines, before)
        elif "--json" in command and command[0] != "generate":
            json.loads(stdout.read_text(), parse_constant=_reject)
        self.outcomes[f"{command[0]} exit {code}"] += 1
        return code

    def _check_refusal(self, command: tuple[str, ...], lines: list[str], before: dict[str, str]) -> None:
        at = [number for number, line in enumerate(lines) if line.startswith("error: ")]
        assert len(at) == 1, (command, lines)
        advice = lines[at[0] + 1 :]
        assert len(advice) <= 1, (command, lines)
        assert all(line.startswith("  ") for line in advice), (command, lines)
        assert not re.search("Traceback|panicked", "".join(lines)), (command, lines)
        assert contents(self.folder) == before, command


def _reject(constant: str) -> NoReturn:
    raise ValueError(f"{constant} is not JSON")


def check_and_build(
    commands: Commands, checkpoint: files.Files, *, as_json: bool, is_inspected: bool
) -> None:
    """`check` says whether `build` succeeds, which leaves the checkpoint as it is; its bundle generates text."""
    _write(commands.folder / "checkpoint", checkpoint)
    before = contents(commands.folder)
    output = ("--json",) if as_json else ()
    if is_inspected:
        commands.run("inspect", "checkpoint", *output)
    code = commands.run("check", "checkpoint", "--deep", "--runtime", "onnx", *output)
    assert code in (0, CheckpointError.exit_code)
    assert commands.run("build", "checkpoint", *BUILD, *output) == code
    after = contents(commands.folder)
    assert {name: after.get(name) for name in before} == before
    if code == 0:
        assert commands.run("verify", "out", *output) == 0
        commands.run("inspect", "out", *output)
        if "tokenizer.json" in checkpoint:
            for options in ((), ("--chat",)):
                commands.run("generate", "out", "--prompt", "for ü", "--max-new-tokens", "3", *options)


def check_a_table(commands: Commands, checkpoint: files.Files, *, as_json: bool, is_inspected: bool) -> None:
    """`check` of a configuration with a table of tensors, and of the configuration alone."""
    _write(commands.folder / "files", checkpoint)
    config = ("check", "--config", "files/config.json", *(("--json",) if as_json else ()))
    code = commands.run(*config, *(() if is_inspected else ("--tensors", "files/table.json")))
    assert code in (0, CheckpointError.exit_code)


def _write(folder: Path, content: files.Files) -> None:
    folder.mkdir()
    for name, data in content.items():
        (folder / name).write_bytes(data)


FAMILIES: dict[str, tuple[Callable[..., None], st.SearchStrategy[files.Files]]] = {
    "configurations": (check_and_build, files.configs()),
    "tokenizers": (check_and_build, files.tokenizers()),
    "chat-templates": (check_and_build, files.templates()),
    "safetensors-headers": (check_and_build, files.headers()),
    "tensor-tables": (check_a_table, files.tables()),
}


@pytest.fixture
def commands(request: pytest.FixtureRequest, zygote: Zygote, tmp_path: Path) -> Iterator[Commands]:
    """Commands that run in forks; a failing example's files stay in build/fuzz if many are tried."""
    number = request.config.getoption("--examples")
    place = ROOT / "build" / "fuzz" if number else tmp_path
    started = Commands(zygote, place / request.node.callspec.id, number)
    yield started
    listed = ", ".join(f"{number} {outcome}" for outcome, number in sorted(started.outcomes.items()))
    logging.getLogger("fuzz").info("%s: %d runs: %s", started.folder.name, started.outcomes.total(), listed)


@pytest.mark.parametrize("family", FAMILIES)
def test_random_files(commands: Commands, family: str) -> None:
    """Each is accepted or refused as above. `build` accepts what `check` accepts, and the bundle passes `verify`."""
    judge, strategy = FAMILIES[family]

    def example(**drawn: Any) -> None:
        judge(commands, **drawn)

    commands.explore(example, checkpoint=strategy, as_json=st.booleans(), is_inspected=st.booleans())


@pytest.mark.parametrize("name", sorted(program.commands))
def test_random_arguments(commands: Commands, bundle: Path, name: str) -> None:
    """Each command accepts them or refuses them as above, and leaves the checkpoint unchanged."""

    def example(command: tuple[str, ...]) -> None:
        arguments.prepare(commands.folder, bundle.parent / "checkpoint", bundle)
        before = contents(commands.folder / "checkpoint")
        commands.run(*command)
        after = contents(commands.folder / "checkpoint")
        assert {name: after.get(name) for name in before} == before, command

    commands.explore(example, command=arguments.arguments(name))
