"""Ends the process within a second of Ctrl-C, SIGTERM or SIGHUP, even inside a native call."""

import os
import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from types import FrameType

SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
"""The signals that ask a process to end: of Ctrl-C, of `kill` and schedulers, and of a closed terminal."""

EXIT_CODES = tuple(128 + number for number in SIGNALS)

GRACE = 0.8
"""Seconds that a command has for cleaning up after a signal."""

SHOW_CURSOR = b"\x1b[?25h"
"""A progress bar hides the terminal's cursor."""


class Interrupted(KeyboardInterrupt):
    """A signal asked the process to end."""

    def __init__(self, number: int) -> None:
        super().__init__()
        self.number = number


def exit_code(error: KeyboardInterrupt) -> int:
    """The exit code of a process that a signal ended, as a shell reports it."""
    return 128 + (error.number if isinstance(error, Interrupted) else signal.SIGINT)


def _interrupt(number: int, _: FrameType | None) -> None:
    raise Interrupted(number)


@contextmanager
def handled() -> Iterator[None]:
    """While the context is open, SIGNALS raise KeyboardInterrupt, and end the process if it still runs after GRACE.

    Python raises only between its own instructions, and a native call may take minutes. Ending the process there is
    as safe as SIGKILL, which everything that writes files here survives. A signal that the parent has the process
    ignore, as `nohup` does, stays ignored.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    reader, writer = os.pipe()
    os.set_blocking(writer, False)
    ended = threading.Event()
    before = signal.set_wakeup_fd(writer, warn_on_full_buffer=False)
    handled_here = [number for number in SIGNALS if signal.getsignal(number) is not signal.SIG_IGN]
    handlers = {number: signal.signal(number, _interrupt) for number in handled_here}
    watcher = threading.Thread(target=_watch, args=(reader, ended), name="interrupts", daemon=True)
    watcher.start()
    try:
        yield
    finally:
        ended.set()
        for number, handler in handlers.items():
            signal.signal(number, handler)
        signal.set_wakeup_fd(before)
        os.close(writer)  # ends the watcher
        watcher.join()
        os.close(reader)


def _watch(reader: int, ended: threading.Event) -> None:
    """Wait for signal numbers, which Python's own handler writes at once whatever the main thread does."""
    while received := os.read(reader, 1):
        if received[0] in SIGNALS and not ended.wait(GRACE):
            cursor = SHOW_CURSOR if sys.stderr.isatty() else b""
            with suppress(OSError):
                stderr, nowhere = os.dup(2), os.open(os.devnull, os.O_WRONLY)
                os.dup2(nowhere, 2)  # for what the main thread may still print: this is the last line
                os.write(stderr, cursor + b"interrupted\n")
            os._exit(128 + received[0])
