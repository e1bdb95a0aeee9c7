"""Runs a command that must be refused, and checks how: one clear line, and nothing of the user's touched."""

from __future__ import annotations

import hashlib
import os
import re
from pathlib import Path

import bad_checkpoints
from click.testing import CliRunner, Result

from nemotrt.exporter.cli import program

ONNX = ("--runtime", "onnx", "--no-validate")
BUILD = ("build", "checkpoint", *ONNX, "--output")


def small_checkpoint() -> None:
    """A good checkpoint at `checkpoint`."""
    bad_checkpoints.write(bad_checkpoints.GOOD, Path("checkpoint"))


def run(*arguments: object) -> Result:
    """The command in this process; only an exit is an answer."""
    result = CliRunner().invoke(program, [str(argument) for argument in arguments])
    assert result.exception is None or isinstance(result.exception, SystemExit), result.exc_info
    return result


def contents(folder: Path) -> dict[str, str]:
    """Everything below the folder: a file's hash, a link's target."""
    found = {}
    for path in sorted(folder.rglob("*")):
        name = str(path.relative_to(folder))
        if path.is_symlink():
            found[name] = f"link to {os.readlink(path)}"
        else:
            kinds = {path.is_dir(): "folder", path.is_fifo(): "pipe"}
            found[name] = kinds.get(True) or digest(path)
    return found


def digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def refused(result: Result, says: str, code: int) -> None:
    """One line that begins with `error:` and holds `says`, at most one line of advice, and the exit code."""
    assert result.exit_code == code, result.output
    lines = [line for line in result.stderr.splitlines() if line.startswith("error: ")]
    assert len(lines) == 1, result.stderr
    assert re.search(says, lines[0]), lines[0]
    after = result.stderr.split(lines[0])[1].splitlines()[1:]
    assert len(after) <= 1, result.stderr
    assert all(line.startswith("  ") for line in after), result.stderr
    assert "Traceback" not in result.stderr
