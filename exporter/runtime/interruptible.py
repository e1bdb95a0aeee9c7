"""Calls into native code that Ctrl-C can interrupt."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor, wait
from typing import TypeVar

Result = TypeVar("Result")


class Interruptible:
    """A thread that runs native calls, while the calling thread waits in Python, where Ctrl-C is handled."""

    def __init__(self) -> None:
        self._executor = ThreadPoolExecutor(1, thread_name_prefix="native")

    def run(self, call: Callable[[], Result], stop: Callable[[], None]) -> Result:
        """Run `call` and return or raise what it does; on Ctrl-C, `stop` must end it, then raises KeyboardInterrupt."""
        future = self._executor.submit(call)
        try:
            return future.result()
        except KeyboardInterrupt:
            stop()
            wait([future])
            raise
