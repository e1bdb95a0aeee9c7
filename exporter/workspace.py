"""The folder that a build works in: next to its output, locked, journaled, renamed when complete.

`.NAME.building/` next to the output NAME holds
    lock           locked by the build that works here
    journal.json   finished stages, with their inputs and results
    bundle/        becomes the output
    replaced/      the bundle that --force replaces, while the new one takes its place
"""

import fcntl
import hashlib
import json
import os
import shutil
import stat
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, Self, TypeVar

from nemotrt.exporter.errors import BundleError, UsageError
from nemotrt.exporter.runtime import files, manifest, strict_json

JOURNAL, LOCK = "journal.json", "lock"
VERSION = 3
"""Version of the journal. A build does not continue from a journal of another version."""

NOT_OURS = "a build would work there: move it away, or choose another --output"

Result = TypeVar("Result")


def digest(*parts: Any) -> str:
    """A SHA-256 of the parts' JSON, with sets sorted: the same in every process."""
    text = json.dumps(parts, sort_keys=True, default=_plain)
    return hashlib.sha256(text.encode()).hexdigest()


def _plain(part: Any) -> Any:
    return sorted(part) if isinstance(part, frozenset) else str(part)


def check_output(output: Path, *, force: bool) -> None:
    """Raise UsageError if the output cannot be created, or exists and may not be replaced."""
    if not output.parent.is_dir():
        raise UsageError(f"{output.parent} is not a folder", hint="create the parent folder of --output")
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
            f"--force cannot replace {output}: {error}", hint="remove it, or choose another --output"
        ) from error
    if strangers := (*findings.added, *findings.irregular):
        raise UsageError(
            f"{output} holds {strangers[0]}, which is not part of the bundle: --force would delete it",
            hint="move it away, or choose another --output",
        )


@dataclass(frozen=True)
class JournalEntry:
    """A stage in the journal."""

    key: str
    """The digest of the stage's inputs."""
    files: dict[str, tuple[int, ...]]
    """Size and modification time of every file in the folder when the stage finished."""
    log: tuple[str, ...]
    """The stage's lines in the build's log."""
    result: str = ""
    """The result as JSON; empty until the stage has finished."""
    bytes_done: int = 0
    """The number of bytes that an unfinished stage has brought to disk."""

    def decode(self, kind: type[Result]) -> Result:
        """The stage's result."""
        return strict_json.decode(kind, strict_json.parse_object(self.result, JOURNAL), JOURNAL)


@dataclass(frozen=True)
class Journal:
    """The stages that a build has recorded, in order."""

    version: int
    stages: dict[str, JournalEntry]


class Workspace:
    """A sibling of the output that remains when a build is killed, so that the next build can continue."""

    def __init__(self, output: Path) -> None:
        named = output if output.name not in ("", "..") else output.resolve()
        self.output = named.parent.resolve() / named.name
        self.root = self.output.parent / f".{self.output.name}.building"
        self.folder = self.root / "bundle"
        """Becomes the output."""
        self._replaced = self.root / "replaced"
        self._journal: dict[str, JournalEntry] = {}

    @classmethod
    @contextmanager
    def open(cls, output: Path, *, force: bool) -> Iterator[Self]:
        """A locked workspace; raises UsageError if another build holds it, and whatever `check_output` raises.

        On exit, the files of finished stages remain for the next build, unless they were cleared or published.
        """
        workspace = cls(output)
        check_output(workspace.output, force=force)
        with workspace._locked():
            workspace._settle_replacement()
            workspace._read_journal()
            try:
                check_output(workspace.output, force=force)
                workspace.folder.mkdir(exist_ok=True)
                yield workspace
            finally:
                workspace._settle_replacement()
                if not workspace.has_results:
                    workspace.clear()

    @contextmanager
    def _locked(self) -> Iterator[None]:
        """Hold the lock; on exit, remove its file and the root if nothing else is in there."""
        file = self._open_lock()
        try:
            yield
        finally:
            # Another build may create its lock between the two calls. Then rmdir fails, and the folder is its own.
            with suppress(OSError):
                if os.listdir(self.root) == [LOCK]:
                    (self.root / LOCK).unlink()
                    self.root.rmdir()
            file.close()

    def _open_lock(self) -> IO[str]:
        path = self.root / LOCK
        while True:
            with suppress(FileExistsError):
                self.root.mkdir()
            try:
                self._check_own()
                file = path.open("a")
            except FileNotFoundError:
                continue  # the previous build has just removed the folder
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
            # The previous holder may have removed the file before it released it: such a lock protects nothing.
            with suppress(FileNotFoundError):
                if os.path.samestat(os.fstat(file.fileno()), path.stat()):
                    return file
            file.close()

    def _check_own(self) -> None:
        """Raise UsageError unless the workspace is a folder that a build has made: what is in it may be removed.

        Links are not followed. A build makes the lock first and removes it last.
        """
        kinds = {self.root: stat.S_IFDIR, self.folder: stat.S_IFDIR, self._replaced: stat.S_IFDIR}
        kinds |= dict.fromkeys((self.root / LOCK, self.root / JOURNAL), stat.S_IFREG)
        for path, kind in kinds.items():
            with suppress(FileNotFoundError):
                if stat.S_IFMT(path.lstat().st_mode) != kind:
                    what = "folder" if kind == stat.S_IFDIR else "regular file"
                    raise UsageError(f"{path} is not a {what}", hint=NOT_OURS)
        if (names := os.listdir(self.root)) and LOCK not in names:
            raise UsageError(f"{self.root} holds {min(names)}, which no build wrote", hint=NOT_OURS)

    def _settle_replacement(self) -> None:
        """Undo or complete a replacement that a killed build left half done."""
        if not self._replaced.exists():
            return
        if os.path.lexists(self.output):
            shutil.rmtree(self._replaced)
        else:
            self._replaced.rename(self.output)

    @property
    def has_results(self) -> bool:
        """Whether the next build of this output can continue from this one."""
        return bool(self._journal)

    def _read_journal(self) -> None:
        path = self.root / JOURNAL
        try:
            fields = strict_json.parse_object(path.read_text(encoding="utf-8"), JOURNAL)
            journal = strict_json.decode(Journal, fields, JOURNAL)
            if journal.version == VERSION and self.folder.is_dir():
                self._journal = journal.stages
        except (FileNotFoundError, UnicodeDecodeError, BundleError):
            self._journal = {}
        if not self._journal:
            # A build was killed before its first stage finished, or just after it was published.
            self.clear()

    def finished(self, stage: str, key: str) -> JournalEntry | None:
        """The stage's entry if it finished with these inputs and its files have not changed, else None.

        If its inputs or files differ, the stage and all stages after it count as not run.
        """
        entry = self._journal.get(stage)
        if entry and entry.key == key and entry.files.items() <= self._files().items():
            return entry if entry.result else None
        self._forget(stage)
        return None

    def _forget(self, stage: str) -> None:
        """Remove the stage and those recorded after it from the journal, before the stage runs again."""
        stages = list(self._journal)
        if stage in stages:
            for later in stages[stages.index(stage) :]:
                del self._journal[later]
            self._write_journal()
        if not self._journal:
            shutil.rmtree(self.folder)
            self.folder.mkdir()

    def record(self, stage: str, key: str, result: Any, log: Sequence[str] = ()) -> None:
        """Record a finished stage and its result, a dataclass, once all its files are on disk."""
        sync(self.folder)
        self._journal[stage] = JournalEntry(key, self._files(), tuple(log), strict_json.encode(result))
        self._write_journal()

    def record_bytes(self, stage: str, key: str, bytes_done: int) -> None:
        """Record how many bytes an unfinished stage has brought to disk."""
        self._journal[stage] = JournalEntry(key, {}, (), bytes_done=bytes_done)
        self._write_journal()

    def bytes_done(self, stage: str, key: str) -> int:
        """The number of bytes that a killed build brought to disk in this stage with the same inputs."""
        entry = self._journal.get(stage)
        return entry.bytes_done if entry and entry.key == key else 0

    def _write_journal(self) -> None:
        files.write_atomic(self.root / JOURNAL, strict_json.encode(Journal(VERSION, self._journal)))

    def _files(self) -> dict[str, tuple[int, ...]]:
        """Size and modification time of every file in the folder, by its path in the folder."""
        stats = {path: path.stat() for path in self.folder.rglob("*") if path.is_file()}
        return {
            str(path.relative_to(self.folder)): (stat.st_size, stat.st_mtime_ns)
            for path, stat in stats.items()
        }

    def clear(self) -> None:
        """Remove everything that the build has written, except what it has published or was about to replace."""
        self._settle_replacement()
        self._journal = {}
        # The journal goes first: an interruption must not leave one that lists removed files.
        (self.root / JOURNAL).unlink(missing_ok=True)
        for partial in self.root.glob(f".{JOURNAL}.*"):
            partial.unlink(missing_ok=True)
        shutil.rmtree(self.folder, ignore_errors=True)

    def publish(self) -> None:
        """Rename the complete folder to the output; a bundle that it replaces is removed afterwards."""
        sync(self.folder)
        if os.path.lexists(self.output):
            self.output.rename(self._replaced)
        self.folder.rename(self.output)
        files.sync(self.output.parent)
        self.clear()


def sync(folder: Path) -> None:
    """Flush every file and folder below to disk."""
    for path in [*folder.rglob("*"), folder]:
        if not path.is_symlink():
            files.sync(path)
