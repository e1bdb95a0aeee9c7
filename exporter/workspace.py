"""The folder that a build works in: beside its output, locked, journalled, and renamed into place when it is whole."""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Self

from nemotrt.exporter.errors import UsageError

JOURNAL = "journal.json"
MANIFEST = "manifest.json"


def digest(*parts: Any) -> str:
    """A SHA-256 over the JSON of the parts: the key of a stage's inputs."""
    text = json.dumps(parts, sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()


class Workspace:
    """A sibling of the output, kept when a build is killed so that the next one continues it."""

    def __init__(self, output: Path, *, force: bool) -> None:
        self.output = output
        self._root = output.parent / f".{output.name}.building"
        self.folder = self._root / "bundle"
        """What becomes the output; the journal lies beside it."""
        self._force = force
        self._journal: dict[str, Any] = {}

    @classmethod
    @contextmanager
    def open(cls, output: Path, *, force: bool) -> Iterator[Self]:
        """A locked workspace; raises UsageError when the output cannot be written or another build holds it."""
        workspace = cls(output, force=force)
        workspace._check_output()
        lock = output.parent / f".{output.name}.lock"
        with lock.open("w") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError as error:
                raise UsageError(
                    f"another build is writing {output}", hint="wait for it, or choose another --output"
                ) from error
            workspace._read_journal()
            try:
                yield workspace
            finally:
                lock.unlink(missing_ok=True)

    def _check_output(self) -> None:
        parent = self.output.parent
        if not parent.is_dir():
            raise UsageError(f"{parent} does not exist", hint="make the folder that --output is to stand in")
        if not os.access(parent, os.W_OK):
            raise UsageError(f"{parent} cannot be written")
        if not self.output.exists() and not self.output.is_symlink():
            return
        if not self._force:
            raise UsageError(f"{self.output} exists", hint="use --force to replace it")
        is_bundle = (
            self.output.is_dir() and not self.output.is_symlink() and (self.output / MANIFEST).is_file()
        )
        is_empty = self.output.is_dir() and not self.output.is_symlink() and not any(self.output.iterdir())
        if not is_bundle and not is_empty:
            raise UsageError(
                f"{self.output} is not a bundle: --force replaces nothing else",
                hint="choose another --output",
            )

    def _read_journal(self) -> None:
        try:
            self._journal = json.loads((self._root / JOURNAL).read_text())
        except (FileNotFoundError, ValueError):
            self._journal = {}
        if not self._journal or not self.folder.is_dir():
            # A build that was killed before its first stage ended, or in the moment of publishing: nothing to keep.
            self.clear()
            self.folder.mkdir(parents=True)

    def result(self, stage: str, key: str) -> Any | None:
        """What the stage recorded when it last ended with these inputs, or None."""
        entry = self._journal.get(stage)
        return entry["result"] if entry and entry["key"] == key else None

    def record(self, stage: str, key: str, result: Any) -> None:
        """Say that the stage ended; what it wrote is on disk before the journal says so."""
        sync(self.folder)
        self._journal[stage] = {"key": key, "result": result}
        write_whole(self._root / JOURNAL, json.dumps(self._journal))

    def clear(self) -> None:
        """Remove all that the build has written."""
        shutil.rmtree(self._root, ignore_errors=True)
        self._journal = {}

    def publish(self) -> None:
        """Rename the folder to the output: all of it is there, or nothing."""
        sync(self.folder)
        old = self.output.parent / f".{self.output.name}.replaced"
        shutil.rmtree(old, ignore_errors=True)
        if self.output.exists():
            self.output.rename(old)
        self.folder.rename(self.output)
        _sync_one(self.output.parent)
        shutil.rmtree(old, ignore_errors=True)
        self.clear()


def write_whole(path: Path, text: str) -> None:
    """Write a file so that it is there whole or not at all."""
    temporary = path.with_name(f".{path.name}.writing")
    temporary.write_text(text, encoding="utf-8")
    _sync_one(temporary)
    temporary.rename(path)


def sync(folder: Path) -> None:
    """Bring every file and folder below to the disk."""
    for path in [*folder.rglob("*"), folder]:
        if not path.is_symlink():
            _sync_one(path)


def _sync_one(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
