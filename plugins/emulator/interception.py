"""Hands the launches of an op's `run` to a function, in place of Triton's launcher."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from types import ModuleType
from typing import Any
from unittest import mock

from nemotrt.plugins.variant import Launch

Start = Callable[[Launch, Mapping[str, Any]], None]
"""Called with each launch, and with the tensors and attributes by name that its parameters are taken from."""


@contextmanager
def intercepted(kernels: ModuleType, sm: int, start: Start) -> Iterator[None]:
    """A context in which `kernels.run` on CPU tensors plans its launches for the SM and gives each to `start`."""

    def replaced(launch: Launch, kernel: object, values: Mapping[str, Any]) -> None:
        start(launch, values)

    with (
        mock.patch.object(Launch, "start", replaced),
        mock.patch.object(kernels, "device_sm", return_value=sm),
    ):
        yield
