"""Ends the process within a second of Ctrl-C, even inside a native call."""

import os
import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager

EXIT_CODE = 128 + signal.SIGINT

GRACE = 0.8
"""Seconds that a command has for cleaning up after Ctrl-C."""

SHOW_CURSOR = b"\x1b[?25h"
"""A progress bar hides the terminal's cursor."""


@contextmanager
def handled() -> Iterator[None]:
    """While the context is open, Ctrl-C raises KeyboardInterrupt, and ends the process if it still runs after GRACE.

    Python raises only between its own instructions, and a native call may take minutes. Ending the process there is
    as safe as SIGKILL, which everything that writes files here survives.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    reader, writer = os.pipe()
    os.set_blocking(writer, False)
    ended = threading.Event()
    before = signal.set_wakeup_fd(writer, warn_on_full_buffer=False)
    watcher = threading.Thread(target=_watch, args=(reader, ended), name="interrupts", daemon=True)
    watcher.start()
    try:
        yield
    finally:
        ended.set()
        signal.set_wakeup_fd(before)
        os.close(writer)  # ends the watcher
        watcher.join()
        os.close(reader)


def _watch(reader: int, ended: threading.Event) -> None:
    """Wait for signal numbers, which Python's own handler writes at once whatever the main thread does."""
    while received := os.read(reader, 1):
        if received[0] == signal.SIGINT and not ended.wait(GRACE):
            cursor = SHOW_CURSOR if sys.stderr.isatty() else b""
            os.write(2, cursor + b"interrupted\n")
            os._exit(EXIT_CODE)
