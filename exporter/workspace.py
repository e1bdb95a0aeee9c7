"""The folder that a build works in: beside its output, locked, journalled, and renamed when it is whole.

`.NAME.building/` beside the output NAME holds
    lock           locked by the build that works here
    journal.json   which stages ended, with what inputs and results
    bundle/        what becomes the output
    replaced/      the bundle that --force replaces, while the new one takes its place
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, Any, Self

from nemotrt.exporter.errors import BundleError, UsageError
from nemotrt.exporter.runtime import files, manifest

JOURNAL, LOCK = "journal.json", "lock"
SO_FAR = " so far"
"""Ends the journal's name for a stage that has not ended."""
VERSION = 2
"""Of the journal: one that another version wrote is not continued."""


def digest(*parts: Any) -> str:
    """A SHA-256 over the JSON of the parts, sets in order: the key of a stage's inputs, the same in every process."""
    text = json.dumps(parts, sort_keys=True, default=_plain)
    return hashlib.sha256(text.encode()).hexdigest()


def _plain(part: Any) -> Any:
    return sorted(part) if isinstance(part, frozenset) else str(part)


def check_output(output: Path, *, force: bool) -> None:
    """Raise UsageError when nothing can stand at the output, or what stands there may not be replaced."""
    if not output.parent.is_dir():
        raise UsageError(
            f"{output.parent} is not a folder", hint="make the folder that --output is to stand in"
        )
    if not os.path.lexists(output):
        return
    if not force:
        raise UsageError(f"{output} exists", hint="use --force to replace it, or choose another --output")
    if output.is_symlink() or not output.is_dir():
        raise UsageError(f"{output} is not a bundle: --force replaces nothing else")
    if not any(output.iterdir()):
        return
    try:
        findings = manifest.examine(output, manifest.read(output), deep=False)
    except BundleError as error:
        raise UsageError(
            f"{output} is not a bundle: --force replaces nothing else", hint="choose another --output"
        ) from error
    if strangers := (*findings.added, *findings.irregular):
        raise UsageError(
            f"{output} holds {strangers[0]}, which is not of the bundle: --force would delete it",
            hint="move it away, or choose another --output",
        )


class Workspace:
    """A sibling of the output, kept when a build is killed so that the next one continues it."""

    def __init__(self, output: Path) -> None:
        named = output if output.name not in ("", "..") else output.resolve()
        self.output = named.parent.resolve() / named.name
        self.root = self.output.parent / f".{self.output.name}.building"
        self.folder = self.root / "bundle"
        """What becomes the output."""
        self._replaced = self.root / "replaced"
        self._journal: dict[str, dict[str, Any]] = {}

    @classmethod
    @contextmanager
    def open(cls, output: Path, *, force: bool) -> Iterator[Self]:
        """A locked workspace; raises UsageError when another build holds it, or as `check_output` does.

        When it is left, what ended stages wrote stays for the next build, unless it was cleared or published.
        """
        workspace = cls(output)
        check_output(workspace.output, force=force)
        with workspace._locked():
            workspace._put_back()
            workspace._read_journal()
            try:
                check_output(workspace.output, force=force)
                workspace.folder.mkdir(exist_ok=True)
                yield workspace
            finally:
                workspace._put_back()
                if not workspace.has_results:
                    workspace.clear()

    @contextmanager
    def _locked(self) -> Iterator[None]:
        """Hold the lock; at the end its file and the root go if nothing else is in there."""
        file = self._open_lock()
        try:
            yield
        finally:
            # Another build may make its lock between the two: then the folder is its own, and stays.
            with suppress(OSError):
                if os.listdir(self.root) == [LOCK]:
                    (self.root / LOCK).unlink()
                    self.root.rmdir()
            file.close()

    def _open_lock(self) -> IO[str]:
        path = self.root / LOCK
        while True:
            self.root.mkdir(exist_ok=True)
            try:
                file = path.open("a")
            except FileNotFoundError:
                continue  # the build before this one has just removed the folder
            except OSError:
                with suppress(OSError):
                    self.root.rmdir()
                raise
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError as error:
                file.close()
                raise UsageError(
                    f"another build is writing {self.output}", hint="wait for it, or choose another --output"
                ) from error
            # A lock on a file that its holder removed before letting go would be a lock on nothing.
            with suppress(FileNotFoundError):
                if os.path.samestat(os.fstat(file.fileno()), path.stat()):
                    return file
            file.close()

    def _put_back(self) -> None:
        """Undo or end the replacement that a killed build was in the middle of."""
        if not self._replaced.exists():
            return
        if os.path.lexists(self.output):
            shutil.rmtree(self._replaced)
        else:
            self._replaced.rename(self.output)

    @property
    def has_results(self) -> bool:
        """Whether a stage has ended, so that the next build of this output can go on from it."""
        return bool(self._journal)

    def _read_journal(self) -> None:
        try:
            found = json.loads((self.root / JOURNAL).read_text(encoding="utf-8"))
        except (FileNotFoundError, ValueError):
            found = {}
        is_ours = isinstance(found, dict) and found.get("version") == VERSION
        if is_ours and found["stages"] and self.folder.is_dir():
            self._journal = found["stages"]
        else:
            # A build was killed before its first stage ended, or just after publishing.
            self.clear()

    def result(self, stage: str, key: str) -> Any | None:
        """What the stage recorded when it last ended with these inputs, or None.

        None too when a file that it wrote is not as it was; it and the stages after it then count as not run.
        """
        entry = self._journal.get(stage)
        if entry and entry["key"] == key and entry["files"].items() <= self._files().items():
            return entry["result"]
        self._forget(stage)
        return None

    def _forget(self, stage: str) -> None:
        """Take the stage and those recorded after it out of the journal before the stage runs again."""
        stages = list(self._journal)
        if stage in stages:
            for later in stages[stages.index(stage) :]:
                del self._journal[later]
            self._write_journal()
        if not self._journal:
            shutil.rmtree(self.folder)
            self.folder.mkdir()

    def record(self, stage: str, key: str, result: Any) -> None:
        """Say that the stage ended; what it wrote is on disk before the journal says so."""
        sync(self.folder)
        self._journal.pop(stage + SO_FAR, None)
        self._journal[stage] = {"key": key, "files": self._files(), "result": result}
        self._write_journal()

    def keep(self, stage: str, key: str, progress: int) -> None:
        """Say how far the stage is; what it wrote up to there is on disk already."""
        self._journal[stage + SO_FAR] = {"key": key, "files": {}, "result": progress}
        self._write_journal()

    def kept(self, stage: str, key: str) -> int:
        """How far the stage came with these inputs before its build was killed; 0 if it did not."""
        return int(self.result(stage + SO_FAR, key) or 0)

    def _write_journal(self) -> None:
        files.write_atomic(self.root / JOURNAL, json.dumps({"version": VERSION, "stages": self._journal}))

    def _files(self) -> dict[str, list[int]]:
        """Size and time of every file in the folder, by its path below it."""
        found = {}
        for path in self.folder.rglob("*"):
            if path.is_file():
                status = path.stat()
                found[str(path.relative_to(self.folder))] = [status.st_size, status.st_mtime_ns]
        return found

    def clear(self) -> None:
        """Remove all that the build has written, but not what it has published or was to replace."""
        self._put_back()
        self._journal = {}
        # The journal first: what it promises must not be half removed if this is interrupted.
        (self.root / JOURNAL).unlink(missing_ok=True)
        for partial in self.root.glob(f".{JOURNAL}.*"):
            partial.unlink(missing_ok=True)
        shutil.rmtree(self.folder, ignore_errors=True)

    def publish(self) -> None:
        """Rename the folder to the output, whole; what stood there is removed after that."""
        sync(self.folder)
        if os.path.lexists(self.output):
            self.output.rename(self._replaced)
        self.folder.rename(self.output)
        files.sync(self.output.parent)
        self.clear()


def sync(folder: Path) -> None:
    """Bring every file and folder below to the disk."""
    for path in [*folder.rglob("*"), folder]:
        if not path.is_symlink():
            files.sync(path)
