"""ONNX Runtime, imported here alone so that its telemetry is always off, and calls into it that Ctrl-C can stop."""

import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor, wait
from importlib import import_module
from importlib.util import find_spec
from types import ModuleType
from typing import TypeVar

from nemotrt.exporter.errors import UsageError

Result = TypeVar("Result")


def load() -> ModuleType:
    """The module `onnxruntime`; raises UsageError if it is not installed.

    The import writes a device id and a database of events to ~/.cache/Microsoft and sends them later. Only this
    variable prevents both, if set before the import (`disable_telemetry_events()` is too late); children inherit it.
    """
    if find_spec("onnxruntime") is None:
        raise UsageError("ONNX Runtime is not installed", hint="pip install 'nemo-export[cpu]'")
    os.environ["ORT_DISABLE_TELEMETRY"] = "1"
    return import_module("onnxruntime")


def errors() -> ModuleType:
    """The module that defines ONNX Runtime's exceptions: `Fail`, `InvalidGraph` and others."""
    return load().capi.onnxruntime_pybind11_state  # type: ignore[no-any-return]


def failures() -> tuple[type[Exception], ...]:
    """All of ONNX Runtime's exceptions: they have no base class, and any may come from a damaged file."""
    return tuple(
        kind for kind in vars(errors()).values() if isinstance(kind, type) and issubclass(kind, Exception)
    )


def raise_if_memory_ran_out(error: Exception) -> None:
    """Raise MemoryError if that is what ONNX Runtime's exception is about."""
    if "bad_alloc" in str(error) or "Failed to allocate memory" in str(error):
        raise MemoryError(str(error)) from error


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
