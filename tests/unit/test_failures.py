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


@pytest.mark.parametrize(
    "error",
    [RuntimeError("can't start new thread"), BlockingIOError(errno.EAGAIN, os.strerror(errno.EAGAIN))],
    ids=str,
)
def test_threads_and_processes_that_run_out(error: Exception) -> None:
    explained = failures.explain(error, "build")
    assert explained
    assert "ulimit -u" in explained.hint


@pytest.mark.parametrize(
    "error",
    [
        RuntimeError("shapes differ"),
        ImportError("cannot import name x from nemotrt.exporter", name="nemotrt.exporter"),
        ModuleNotFoundError("No module named 'nemotrt.exporter.x'", name="nemotrt.exporter.x"),
        PermissionError(errno.EACCES, os.strerror(errno.EACCES)),
        FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), "runs/out of memory/config.json"),
    ],
    ids=str,
)
def test_other_errors_are_not_explained(error: Exception) -> None:
    assert failures.explain(error, "build") is None


@pytest.mark.parametrize(
    ("module", "says"),
    [
        ("torch", "build needs torch, which is not installed"),
        ("google.protobuf", "build needs google.protobuf, which is not installed"),
        ("torch._C", "torch is installed, but cannot be imported"),
        ("numpy._core._multiarray_umath", "numpy is installed, but cannot be imported"),
    ],
)
def test_a_package_without_one_of_its_modules_is_broken(module: str, says: str) -> None:
    error = ModuleNotFoundError(f"No module named '{module}'", name=module)
    explained = failures.explain(error, "build")
    assert explained
    assert str(explained).startswith(says)


def test_a_limit_on_addresses_limits_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    unlimited = environment.memory_bytes()
    monkeypatch.setattr(environment, "address_space_limit", lambda: environment.UNUSED_ADDRESSES + 10.0)
    assert environment.memory_bytes() == 10 < unlimited
    monkeypatch.setattr(environment, "address_space_limit", lambda: 5.0)
    assert environment.memory_bytes() == 0
