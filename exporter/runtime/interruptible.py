"""Long calls into native code that Ctrl-C can end."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor, wait
from typing import TypeVar

Result = TypeVar("Result")


class Interruptible:
    """A thread for native calls: Python answers Ctrl-C between its own instructions, so it waits outside."""

    def __init__(self) -> None:
        self._executor = ThreadPoolExecutor(1, thread_name_prefix="native")

    def run(self, call: Callable[[], Result], stop: Callable[[], None]) -> Result:
        """What `call` returns or raises; on Ctrl-C `stop` must end it, and KeyboardInterrupt is raised."""
        future = self._executor.submit(call)
        try:
            return future.result()
        except KeyboardInterrupt:
            stop()
            wait([future])
            raise
