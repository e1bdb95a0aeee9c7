"""What a person sees while a command works: stages and bars on stderr, and nothing at all with --quiet."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.console import Console as RichConsole
    from rich.progress import Progress


@dataclass
class Console:
    """Talk on stderr; data goes to stdout by `click.echo`, elsewhere."""

    quiet: bool = False
    verbose: bool = False
    debug: bool = False
    log: list[str] = field(default_factory=list)
    """All that was said, details too, without seconds: equal builds have equal logs."""
    seconds: dict[str, float] = field(default_factory=dict)
    """What each stage took."""

    @cached_property
    def _rich(self) -> RichConsole:
        # Rich takes a third of the time that --help has.
        from rich.console import Console as RichConsole

        return RichConsole(stderr=True, highlight=False, soft_wrap=True, quiet=self.quiet)

    def say(self, text: str, *, logged: bool = True) -> None:
        """One line for a person."""
        if logged:
            self.log.append(text)
        self._rich.print(text, markup=False)

    def detail(self, text: str) -> None:
        """One line that only --verbose shows."""
        self.log.append(text)
        if self.verbose:
            self._rich.print(text, markup=False, style="dim")

    @contextmanager
    def stage(
        self, name: str, what: str, *, total: int | None = None, is_bytes: bool = False
    ) -> Iterator[Callable[[int], None]]:
        """A stage of the work: at its end a line that says how long it took.

        Gives what advances its bar up to `total`. A terminal shows the bar, or a spinner where there is no
        total; elsewhere --verbose says when a stage begins.
        """
        title = f"{name:<9} {what}"
        started, ended = time.perf_counter(), "stopped after "
        self._begin(title)
        try:
            with self._progress(total, is_bytes=is_bytes) as progress:
                task = progress.add_task(title, total=total)
                yield lambda done: progress.advance(task, done)
            ended = ""
        finally:
            self.log.append(title + ("  stopped" if ended else ""))
            self.seconds[name] = time.perf_counter() - started
            self._rich.print(f"{title}  {ended}{self.seconds[name]:.1f} s", markup=False)

    def _begin(self, title: str) -> None:
        if self.verbose and not sys.stderr.isatty():
            self._rich.print(f"{title} …", markup=False, style="dim")

    def _progress(self, total: int | None, *, is_bytes: bool) -> Progress:
        from rich import progress

        shown: list[progress.ProgressColumn | str] = [progress.SpinnerColumn(), "{task.description}"]
        if total is not None:
            shown += [progress.BarColumn(), progress.TaskProgressColumn()]
            shown += [progress.DownloadColumn()] if is_bytes else []
        shown.append(progress.TimeElapsedColumn())
        shown += [progress.TimeRemainingColumn()] if total is not None else []
        return progress.Progress(
            *shown,
            console=self._rich,
            transient=True,
            disable=self.quiet or not sys.stderr.isatty(),
        )
