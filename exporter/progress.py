"""How long-running work reports its progress: stage by stage, counted up to a total."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
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
