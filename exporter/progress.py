"""How long-running work reports its progress: stage by stage, counted up to a total."""

import logging
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Protocol

Advance = Callable[[int], None]
"""A function that long-running work calls with the amount done since its last call."""


def ignore(_: int) -> None:
    """An `Advance` that reports nothing."""


class Progress(Protocol):
    """An object that shows the stages of a pipeline while they run."""

    def stage(
        self, name: str, what: str, *, total: int | None = None, is_bytes: bool = False
    ) -> AbstractContextManager[Advance]:
        """Show a stage while the context is open; yields an `Advance` that counts up to `total`."""


class SilentProgress:
    """A `Progress` that shows nothing, for use as a library."""

    def stage(
        self, name: str, what: str, *, total: int | None = None, is_bytes: bool = False
    ) -> AbstractContextManager[Advance]:
        """A context that yields `ignore`."""
        return nullcontext(ignore)


SILENT: Progress = SilentProgress()

log = logging.getLogger(__name__)


class BuildLog:
    """Forwards a build's progress and collects the lines of its log.

    Lines hold neither times nor paths, so that equal builds have equal logs.
    """

    def __init__(self, progress: Progress) -> None:
        self._progress = progress
        self.lines: list[str] = []

    def note(self, text: str, level: int = logging.INFO) -> None:
        """Log a line below the current stage."""
        self.lines.append(f"{'':<9} {text}")
        log.log(level, text)

    @contextmanager
    def stage(
        self, name: str, what: str, *, total: int | None = None, is_bytes: bool = False
    ) -> Iterator[Advance]:
        """Show a stage, and log its title when it ends."""
        outcome = "  stopped"
        try:
            with self._progress.stage(name, what, total=total, is_bytes=is_bytes) as advance:
                yield advance
            outcome = ""
        finally:
            self.lines.append(f"{name:<9} {what}{outcome}")
