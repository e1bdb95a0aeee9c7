"""Prints progress bars and log records to stderr, as --quiet and --verbose ask."""

from __future__ import annotations

import logging
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cached_property
from typing import TYPE_CHECKING

from nemotrt.exporter.commands.terminal import rich_console
from nemotrt.exporter.progress import Advance

if TYPE_CHECKING:
    from rich.console import Console as RichConsole
    from rich.progress import Progress as RichProgress

LOGGER = "nemotrt"
"""The root of all loggers of this package."""


class Console(logging.Handler):
    """Shows progress and log records on stderr. Results go to stdout, by `click.echo`."""

    def __init__(self) -> None:
        super().__init__(logging.INFO)
        self.debug = False
        self.seconds: dict[str, float] = {}
        """Duration of each finished stage."""

    @property
    def quiet(self) -> bool:
        """Whether only errors are shown."""
        return self.level > logging.WARNING

    @contextmanager
    def attached(self) -> Iterator[None]:
        """Print the records of this package's loggers while the context is open."""
        logger = logging.getLogger(LOGGER)
        previous = logger.level
        logger.setLevel(logging.DEBUG)
        logger.addHandler(self)
        try:
            yield
        finally:
            logger.removeHandler(self)
            logger.setLevel(previous)

    @cached_property
    def _rich(self) -> RichConsole:
        return rich_console(stderr=True, highlight=False, soft_wrap=True, quiet=self.quiet)

    def emit(self, record: logging.LogRecord) -> None:
        """Print the record on a line of its own, below its stage."""
        style = "dim" if record.levelno <= logging.DEBUG else None
        margin = "" if record.levelno >= logging.WARNING else " " * 10
        self._rich.print(margin + record.getMessage(), markup=False, style=style)

    @contextmanager
    def stage(
        self, name: str, what: str, *, total: int | None = None, is_bytes: bool = False
    ) -> Iterator[Advance]:
        """Show a stage, and at its end a line with its duration; yields the function that advances its bar.

        A terminal shows a bar, or a spinner if there is no `total`. Elsewhere --verbose prints a line when a stage
        begins.
        """
        title = f"{name:<9} {what}"
        started, outcome = time.perf_counter(), "stopped after "
        if self.level <= logging.DEBUG and not sys.stderr.isatty():
            self._rich.print(f"{title} …", markup=False, style="dim")
        try:
            with self._bar(total, is_bytes=is_bytes) as bar:
                task = bar.add_task(title, total=total)
                yield lambda done: bar.advance(task, done)
            outcome = ""
        finally:
            self.seconds[name] = time.perf_counter() - started
            self._rich.print(f"{title}  {outcome}{self.seconds[name]:.1f} s", markup=False)

    def _bar(self, total: int | None, *, is_bytes: bool) -> RichProgress:
        from rich import progress

        columns: list[progress.ProgressColumn | str] = [
            progress.SpinnerColumn(),
            progress.TextColumn("{task.description}", markup=False),  # a name may hold brackets
        ]
        if total is not None:
            columns += [progress.BarColumn(), progress.TaskProgressColumn()]
            columns += [progress.DownloadColumn()] if is_bytes else []
        columns.append(progress.TimeElapsedColumn())
        columns += [progress.TimeRemainingColumn()] if total is not None else []
        return progress.Progress(
            *columns, console=self._rich, transient=True, disable=self.quiet or not sys.stderr.isatty()
        )
