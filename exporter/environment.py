"""What this machine has and can do, asked once and said in words."""

from __future__ import annotations

import os
import platform
from contextlib import suppress
from importlib import metadata
from pathlib import Path

PACKAGES = (
    "nemo-export",
    "torch",
    "onnx",
    "onnx-ir",
    "onnxruntime",
    "onnxruntime-gpu",
    "tensorrt-rtx-cu13",
    "tensorrt",
)
"""Packages whose versions decide what a build gives."""

CGROUP_LIMIT = Path("/sys/fs/cgroup/memory.max")
"""A container's limit: a number, or `max` (https://docs.kernel.org/admin-guide/cgroup-v2.html)."""


def tool_versions() -> dict[str, str]:
    """The installed ones of PACKAGES → their versions, and Python's."""
    found = {"python": platform.python_version()}
    for package in PACKAGES:
        with suppress(metadata.PackageNotFoundError):
            found[package] = metadata.version(package)
    return found


def machine() -> dict[str, str]:
    """The operating system and the processor's architecture."""
    return {"os": platform.system(), "release": platform.release(), "arch": platform.machine()}


def memory_bytes() -> int:
    """Bytes of memory that this process may have: the machine's, or its container's where that is less."""
    whole = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    with suppress(OSError, ValueError):
        return min(whole, int(CGROUP_LIMIT.read_text()))
    return whole


def num_cores() -> int:
    """Processor cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
