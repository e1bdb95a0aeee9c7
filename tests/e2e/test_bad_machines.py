"""Machines that cannot run a command: one clear line, no traceback, nothing left behind."""

from __future__ import annotations

import os
import re
import resource
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from bad_machines import ADDRESSES, PACKAGES

PROGRAM = (sys.executable, "-c", "from nemotrt.exporter.cli import main; main()")


def refused(
    bundle: Path,
    arguments: tuple[str, ...],
    says: str,
    *,
    path: Path,
    limit: Callable[[], None] | None = None,
) -> None:
    """The command in a process of its own, next to a bundle and its checkpoint: one line, and exit 2."""
    before = sorted(os.listdir(bundle.parent))
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(path), *filter(None, sys.path)])}
    done = subprocess.run(
        [*PROGRAM, "--quiet", *arguments],
        cwd=bundle.parent,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
        preexec_fn=limit,
    )
    first, *rest = done.stderr.splitlines()
    assert re.match(f"error: .*{says}", first), done.stderr
    assert len(rest) <= 1, done.stderr
    assert (done.returncode, done.stdout) == (2, "")
    assert sorted(os.listdir(bundle.parent)) == before


@pytest.mark.parametrize("name", PACKAGES)
def test_a_package_that_is_missing_or_broken(tmp_path: Path, bundle: Path, name: str) -> None:
    """A command that needs it names the package and what to install."""
    arguments, package, code, says = PACKAGES[name]
    (tmp_path / package).mkdir()
    (tmp_path / package / "__init__.py").write_text(code)
    refused(bundle, arguments, says, path=tmp_path)


@pytest.mark.parametrize("name", ADDRESSES)
def test_too_few_addresses(tmp_path: Path, bundle: Path, name: str) -> None:
    """Under `ulimit -v`, a command is refused before a library ends the process."""
    arguments, num_bytes, says = ADDRESSES[name]
    limits = (num_bytes, num_bytes)
    refused(
        bundle, arguments, says, path=tmp_path, limit=lambda: resource.setrlimit(resource.RLIMIT_AS, limits)
    )
