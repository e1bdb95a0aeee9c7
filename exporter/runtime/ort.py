"""ONNX Runtime, imported here and nowhere else, so that its telemetry is always off."""

from __future__ import annotations

import os
from importlib import import_module
from importlib.util import find_spec
from types import ModuleType

from nemotrt.exporter.errors import UsageError


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
