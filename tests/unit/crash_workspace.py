"""Kills a build of a small bundle at each of its file operations in turn, and judges what every kill leaves.

Run as a process of its own: it forks, which a test runner with threads should not.
usage: crash_workspace.py FOLDER
"""

from __future__ import annotations

import os
import signal
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nemotrt.exporter.errors import UsageError
from nemotrt.exporter.runtime import manifest as manifests
from nemotrt.exporter.workspace import Workspace

EVENTS = ("os.rename", "os.remove", "os.mkdir", "os.rmdir", "fcntl.flock")
"""What changes a folder, as Python announces it (https://docs.python.org/3/library/audit_events.html)."""
WRITING = os.O_WRONLY | os.O_RDWR | os.O_CREAT
KEY = "inputs"


@dataclass(frozen=True)
class Stage:
    """The result of a stage."""

    content: str


def write_manifest(folder: Path) -> None:
    """The manifest of a bundle of one file."""
    empty = manifests.GraphSummary((), (), ())
    manifests.write(
        folder,
        manifests.Manifest(
            schema_version=manifests.SCHEMA_VERSION,
            bundle_id="",
            files=manifests.describe_files(folder, {"graph": manifests.Role.GRAPH}),
            model=manifests.ModelSummary((), {}, "fp32", 1, ()),
            source=manifests.Source("none", "", {}),
            graph=empty,
            profiles=(),
            environment=manifests.BuildEnvironment("", "", {}),
            plugins=(),
            partial=False,
            not_exported=(),
            validation=manifests.ValidationSummary(manifests.Verdict.NOT_RUN, 0, 0, "", ()),
            license="",
        ),
    )


def build(output: Path, content: str) -> bool:
    """A build as the pipeline makes it; gives whether the first stage was kept."""
    with Workspace.open(output, force=True) as workspace:
        entry = workspace.finished("first", KEY)
        kept = entry is not None and entry.decode(Stage) == Stage(content)
        if not kept:
            (workspace.folder / "graph").write_text(content)
            workspace.record("first", KEY, Stage(content))
        write_manifest(workspace.folder)
        workspace.publish()
    return kept


def killed_at(number: int, output: Path) -> bool:
    """Whether a build died at its `number`th file operation; False when it ended before that."""
    child = os.fork()
    if child == 0:
        left = number

        def count(event: str, arguments: tuple[Any, ...]) -> None:
            nonlocal left
            if event in EVENTS or (event == "open" and arguments[2] & WRITING):
                left -= 1
                if left < 0:
                    os.kill(os.getpid(), signal.SIGKILL)

        sys.addaudithook(count)
        build(output, "new")
        os._exit(0)
    _, status = os.waitpid(child, 0)
    assert os.WIFSIGNALED(status) or os.WEXITSTATUS(status) == 0, status
    return os.WIFSIGNALED(status)


def seen(output: Path) -> str:
    """What a reader of the output finds: a whole bundle's content, or nothing at all."""
    if not output.exists():
        return ""
    manifests.verify(output, deep=True)
    return (output / "graph").read_text()


def opened_without_force(output: Path) -> str:
    """What stands at the output after a further build was refused because it exists."""
    try:
        with Workspace.open(output, force=False):
            raise AssertionError("an output that exists was not refused")
    except UsageError:
        return seen(output)


def main(folder: Path) -> None:
    """One line for each kill: where, what a reader then found, and what the next build kept."""
    kills = 0
    while True:
        place = folder / str(kills)
        place.mkdir()
        output = place / "out"
        build(output, "old")
        if not killed_at(kills, output):
            break
        at_once = seen(output)
        assert at_once in ("old", "new", ""), at_once
        # What was to be replaced is never lost: it is there, or the next build puts it back before all else.
        later = opened_without_force(output)
        assert later in ("old", "new"), later
        kept = build(output, "newer" if later == "new" else "new")
        assert seen(output) in ("new", "newer")
        assert os.listdir(place) == ["out"], os.listdir(place)
        sys.stdout.write(f"{kills} {at_once or 'nothing'} {later} {'kept' if kept else 'again'}\n")
        kills += 1


if __name__ == "__main__":
    main(Path(sys.argv[1]))
