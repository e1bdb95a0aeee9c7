"""What a person sees while a command works: stages and bars on stderr, and nothing at all with --quiet."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from rich.console import Console as RichConsole
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn


@dataclass
class Console:
    """Talk on stderr; data goes to stdout by `click.echo`, elsewhere."""

    quiet: bool = False
    verbose: bool = False

    def __post_init__(self) -> None:
        self._rich = RichConsole(stderr=True, highlight=False, soft_wrap=True, quiet=self.quiet)

    def say(self, text: str) -> None:
        """One line for a person."""
        self._rich.print(text, markup=False)

    def detail(self, text: str) -> None:
        """One line that only --verbose shows."""
        if self.verbose:
            self._rich.print(text, markup=False, style="dim")

    @contextmanager
    def stage(self, name: str, what: str) -> Iterator[None]:
        """A stage of a build: its line with the seconds it took, once it is done."""
        started = time.perf_counter()
        if sys.stderr.isatty() and not self.quiet:
            with self._rich.status(f"{name}: {what}"):
                yield
        else:
            yield
        self.say(f"{name:<9} {what}  {time.perf_counter() - started:.1f} s")

    @contextmanager
    def bar(self, name: str, total: int) -> Iterator[Callable[[int], None]]:
        """A progress bar over bytes; quiet where stderr is not a terminal."""
        with Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            DownloadColumn(),
            TimeRemainingColumn(),
            console=self._rich,
            transient=True,
            disable=self.quiet or not sys.stderr.isatty(),
        ) as progress:
            task = progress.add_task(name, total=total)
            yield lambda done: progress.advance(task, done)
