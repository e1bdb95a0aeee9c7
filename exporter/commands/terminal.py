"""Stdout and stderr that may be closed, full or not UTF-8, and text that must not control the terminal."""

from __future__ import annotations

import io
import os
import select
import signal
import sys
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any, TextIO

import click

from nemotrt.exporter.errors import UsageError

if TYPE_CHECKING:
    from _typeshed import ReadableBuffer
    from rich.console import Console as RichConsole


def printable(text: str) -> str:
    """The text with every character that is not printed, other than a line break, as an escape such as \\x1b.

    A tensor's or a file's name can hold anything, and a terminal would obey it.
    """
    if text.isprintable():
        return text
    return "".join(
        character
        if character == "\n" or character.isprintable()
        else character.encode("unicode_escape").decode()
        for character in text
    )


def rich_console(**options: Any) -> RichConsole:
    """A console of Rich that prints `printable` text only; importing Rich takes a third of the budget of --help."""
    from rich.console import Console, ConsoleOptions, RenderableType
    from rich.segment import Segment

    class PrintableConsole(Console):
        def render(
            self, renderable: RenderableType, options: ConsoleOptions | None = None
        ) -> Iterable[Segment]:
            for text, style, control in super().render(renderable, options):
                yield Segment(text if control else printable(text), style, control)

    return PrintableConsole(**options)


def use_robust_streams() -> None:
    """Replace stdout and stderr: results that cannot be written are an error, and log lines are dropped.

    A character that the encoding lacks is printed as a question mark, or in stderr as an escape.
    """
    # A closed stream's number would go to the next file that is opened. A write to stdout is to fail, as if closed.
    for number, flags in enumerate((os.O_RDONLY, os.O_RDONLY, os.O_WRONLY)):
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, flags)
    sys.stdout = _text(_Results(1, "w", closefd=False), sys.stdout, "replace")
    sys.stderr = _text(_Log(2, "w", closefd=False), sys.stderr, "backslashreplace")


def _text(raw: io.FileIO, stream: TextIO | None, errors: str) -> io.TextIOWrapper:
    encoding = stream.encoding if stream else "utf-8"
    is_unbuffered = isinstance(stream, io.TextIOWrapper) and stream.write_through
    is_line_buffered = isinstance(raw, _Log) or raw.isatty()
    return io.TextIOWrapper(
        io.BufferedWriter(raw), encoding, errors, line_buffering=is_line_buffered, write_through=is_unbuffered
    )


class _Results(io.FileIO):
    """Stdout, which holds results: the first write that fails ends the command."""

    has_failed = False

    def write(self, data: ReadableBuffer, /) -> int:
        """Write, and wait for a pipe that another program has set to not block."""
        while not self.has_failed:
            try:
                if (written := super().write(data)) is not None:
                    return written
                select.select((), (self,), ())
            except BrokenPipeError as error:
                self.has_failed = True
                raise click.exceptions.Exit(
                    128 + signal.SIGPIPE
                ) from error  # as the system ends other programs
            except OSError as error:
                self.has_failed = True
                raise UsageError(f"stdout cannot be written: {error.strerror}") from error
        return memoryview(data).nbytes


class _Log(io.FileIO):
    """Stderr: a command does not fail for its log."""

    def write(self, data: ReadableBuffer, /) -> int:
        """Write, or drop what cannot be written."""
        try:
            written = super().write(data)
        except OSError:
            written = None
        return memoryview(data).nbytes if written is None else written
