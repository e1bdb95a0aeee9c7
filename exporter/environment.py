"""Facts about this machine and its installed packages, and process-wide settings of its libraries."""

import ctypes
import math
import os
import platform
import resource
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
"""Packages whose versions affect the result of a build."""

UNUSED_ADDRESSES = 1_200_000_000
"""Addresses that libraries and threads map without using the memory, measured in builds on two cores."""

CGROUP_LIMIT = Path("/sys/fs/cgroup/memory.max")
"""A container's memory limit: a number, or `max` (https://docs.kernel.org/admin-guide/cgroup-v2.html)."""


def tool_versions() -> dict[str, str]:
    """The versions of Python and of the installed PACKAGES."""
    versions = {"python": platform.python_version()}
    for package in PACKAGES:
        with suppress(metadata.PackageNotFoundError):
            versions[package] = metadata.version(package)
    return versions


def machine() -> dict[str, str]:
    """The operating system and the processor's architecture."""
    return {"os": platform.system(), "release": platform.release(), "arch": platform.machine()}


def memory_bytes() -> int:
    """Bytes of memory that this process may use: the machine's, or the container's or `ulimit -v`'s if that is less."""
    limits = [os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")]
    with suppress(OSError, ValueError):
        limits.append(int(CGROUP_LIMIT.read_text()))
    if (addresses := address_space_limit()) < math.inf:
        limits.append(max(0, int(addresses) - UNUSED_ADDRESSES))
    return min(limits)


def address_space_limit() -> float:
    """Bytes of addresses that `ulimit -v` allows this process; infinite without such a limit."""
    limit = resource.getrlimit(resource.RLIMIT_AS)[0]
    return math.inf if limit == resource.RLIM_INFINITY else limit


def num_cores() -> int:
    """Processor cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def give_back_memory() -> None:
    """Return freed memory to the system, if the C library can.

    After the validation of a model with 321 M parameters, glibc held 0.8 GB of freed memory.
    """
    if trim := getattr(ctypes.CDLL(None), "malloc_trim", None):
        trim(0)


def disable_amx() -> None:
    """Keep PyTorch's oneDNN from AMX, unless the user has set ONEDNN_MAX_CPU_ISA; call it before the first product.

    The reference then computes alike on every x86 processor with AVX-512. Some virtual machines announce AMX and end
    the process with an illegal instruction at its first use. The cost: on a processor with AMX, BF16 and FP16 products
    of the rounding baseline run on AVX-512 units. FP32 products, most of a validation, do not use AMX.
    """
    os.environ.setdefault("ONEDNN_MAX_CPU_ISA", "AVX512_CORE_FP16")
