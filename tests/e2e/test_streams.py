"""Stdout and stderr that are closed, full, closed by their reader or not UTF-8, and names with control characters."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import bad_checkpoints
import pytest
import torch
from click.testing import CliRunner
from safetensors.torch import save_file

from nemotrt.exporter.cli import program
from nemotrt.exporter.commands.terminal import printable

PROGRAM = "import sys; from nemotrt.exporter.cli import main; sys.exit(main())"
CLEAR_SCREEN = "\x1b[2J\x1b]0;title\x07\x9b31m\r"
SHOWN = r"\x1b[2J\x1b]0;title\x07\x9b31m\r"


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A good checkpoint of one layer."""
    folder = tmp_path_factory.mktemp("streams") / "checkpoint"
    bad_checkpoints.write(bad_checkpoints.GOOD, folder)
    return folder


def run(
    *arguments: object, shell: str = "", environment: dict[str, str] | None = None
) -> subprocess.CompletedProcess[bytes]:
    """The command in a process of its own; `shell` redirects its streams."""
    command = ["bash", "-c", f'"$@" {shell}', "bash", sys.executable, "-c", PROGRAM, *map(str, arguments)]
    return subprocess.run(
        command, capture_output=True, check=False, env={**os.environ, **(environment or {})}
    )


@dataclass(frozen=True)
class Redirection:
    """How a shell redirects a stream, and what the command does then."""

    shell: str
    code: int
    says: bytes = b""


STDOUT = {
    "closed": Redirection(">&-", 2, b"error: stdout cannot be written: Bad file descriptor"),
    "full": Redirection(">/dev/full", 2, b"error: stdout cannot be written: No space left on device"),
    "closed-by-its-reader": Redirection("| head -c1; exit ${PIPESTATUS[0]}", 141),
}


@pytest.mark.parametrize("name", STDOUT)
def test_an_unusable_stdout(checkpoint: Path, name: str) -> None:
    """Results that cannot be written are an error with exit 2; if their reader closes a pipe, exit 141."""
    case = STDOUT[name]
    result = run("-q", "inspect", checkpoint, shell=case.shell)
    assert (result.returncode, result.stderr.strip()) == (case.code, case.says)


@pytest.mark.parametrize("name", ["closed", "full"])
def test_an_unusable_stderr(checkpoint: Path, tmp_path: Path, name: str) -> None:
    """The build succeeds, and its log is dropped."""
    output = tmp_path / "bundle"
    options = ("--runtime", "onnx", "--no-validate")
    result = run(
        "build", checkpoint, "-o", output, *options, shell={"closed": "2>&-", "full": "2>/dev/full"}[name]
    )
    assert result.returncode == 0
    assert CliRunner().invoke(program, ["verify", str(output)]).exit_code == 0


ENCODINGS = {
    "ascii": ({"PYTHONIOENCODING": "ascii"}, b"?"),
    "latin-1": ({"PYTHONIOENCODING": "latin-1"}, b"\xb7"),
    "c-locale": ({"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}, b"?"),
}
"""A name → variables of the environment, and how stdout then shows a middle dot."""


@pytest.mark.parametrize("name", ENCODINGS)
def test_an_encoding_that_lacks_characters(name: str) -> None:
    """The results are printed; a character that the encoding lacks is a question mark."""
    environment, dot = ENCODINGS[name]
    result = run("check", bad_checkpoints.EXAMPLE, environment=environment)
    assert result.returncode == 0, result.stderr
    assert b"mamba_num_heads " + dot + b" mamba_head_dim" in result.stdout


def hostile_tensor(folder: Path) -> tuple[str, ...]:
    """A checkpoint with a tensor of that name."""
    bad_checkpoints.write(bad_checkpoints.GOOD, folder)
    save_file(
        bad_checkpoints.stored(folder) | {CLEAR_SCREEN: torch.zeros(3)}, folder / bad_checkpoints.SINGLE
    )
    return ("check", str(folder))


def hostile_field(folder: Path) -> tuple[str, ...]:
    """A configuration with a field of that name."""
    bad_checkpoints.write(bad_checkpoints.Case("", config={CLEAR_SCREEN: 1}), folder)
    return ("build", str(folder), "-o", str(folder.parent / "out"))


def hostile_path(folder: Path) -> tuple[str, ...]:
    """A checkpoint folder of that name."""
    bad_checkpoints.write(bad_checkpoints.GOOD, folder.parent / CLEAR_SCREEN)
    return ("check", str(folder.parent / CLEAR_SCREEN))


def hostile_option(_: Path) -> tuple[str, ...]:
    """An option of that name."""
    return ("check", f"--{CLEAR_SCREEN}")


HOSTILE: dict[str, Callable[[Path], tuple[str, ...]]] = {
    "tensor": hostile_tensor,
    "field-of-config-json": hostile_field,
    "checkpoint-folder": hostile_path,
    "option": hostile_option,
}


@pytest.mark.parametrize("name", HOSTILE)
def test_names_with_control_characters(tmp_path: Path, name: str) -> None:
    """They are shown as escapes such as \\x1b and never reach the terminal."""
    result = CliRunner().invoke(program, HOSTILE[name](tmp_path / "checkpoint"))
    printed = result.stdout + result.stderr
    assert r"\x1b[2J" in printed
    assert not [c for c in printed if c != "\n" and not c.isprintable()]


def test_a_name_is_shown_with_its_control_characters_as_escapes() -> None:
    """Each is an escape; letters of any script stay."""
    assert printable(CLEAR_SCREEN) == SHOWN
    assert printable("modèle 试验\n\u202egnp.exe\ud800") == "modèle 试验\n\\u202egnp.exe\\ud800"
