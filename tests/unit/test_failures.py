"""Errors of libraries that a user can do something about are explained, and no others."""

from __future__ import annotations

import errno
import os

import pytest

from nemotrt.exporter import environment
from nemotrt.exporter.commands import failures

OUT_OF_MEMORY = [
    MemoryError(),
    OSError(errno.ENOMEM, "Cannot allocate memory"),
    RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 23476368 bytes"),
    RuntimeError("std::bad_alloc"),
    ImportError("libtorch_cpu.so: failed to map segment from shared object"),
]


@pytest.mark.parametrize("error", OUT_OF_MEMORY, ids=str)
def test_memory_that_runs_out(error: Exception, monkeypatch: pytest.MonkeyPatch) -> None:
    explained = failures.explain(error, "build")
    assert str(explained) == "out of memory"
    assert explained
    assert "check estimates" in explained.hint
    monkeypatch.setattr(failures, "address_space_limit", lambda: 2e9)
    explained = failures.explain(error, "build")
    assert explained
    assert explained.hint == "ulimit -v allows 2 GB of addresses: raise it"


def test_threads_that_run_out() -> None:
    explained = failures.explain(RuntimeError("can't start new thread"), "build")
    assert explained
    assert "ulimit -u" in explained.hint


@pytest.mark.parametrize(
    "error",
    [
        RuntimeError("shapes differ"),
        ImportError("cannot import name x from nemotrt.exporter", name="nemotrt.exporter"),
        ModuleNotFoundError("No module named 'nemotrt.exporter.x'", name="nemotrt.exporter.x"),
        PermissionError(errno.EACCES, os.strerror(errno.EACCES)),
    ],
    ids=str,
)
def test_other_errors_are_not_explained(error: Exception) -> None:
    assert failures.explain(error, "build") is None


def test_a_limit_on_addresses_limits_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    unlimited = environment.memory_bytes()
    monkeypatch.setattr(environment, "address_space_limit", lambda: environment.UNUSED_ADDRESSES + 10.0)
    assert environment.memory_bytes() == 10 < unlimited
    monkeypatch.setattr(environment, "address_space_limit", lambda: 5.0)
    assert environment.memory_bytes() == 0
