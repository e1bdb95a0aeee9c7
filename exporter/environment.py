"""What this machine has and can do, asked once and said in words."""

from __future__ import annotations

import ctypes
import mmap
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

CPU_FLAGS = Path("/proc/cpuinfo")
MAX_TILE_PALETTE = bytes.fromhex("53 b81d000000 31c9 0fa2 5b c3")
"""push rbx; mov eax, 0x1d; xor ecx, ecx; cpuid; pop rbx; ret: leaf 1D has the palettes of AMX's tiles."""
WITHOUT_AMX = ("ONEDNN_MAX_CPU_ISA", "AVX512_CORE_FP16")


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


def give_back_memory() -> None:
    """Have the C library give the pages that it keeps for later allocations back to the system, where it can.

    glibc kept 0.8 GB of what comparing a model of 321 M parameters had freed.
    """
    if trim := getattr(ctypes.CDLL(None), "malloc_trim", None):
        trim(0)


def hide_unusable_amx() -> None:
    """Keep PyTorch's oneDNN from AMX where the processor announces it and has no tile palette.

    Some virtual machines pass AMX's flags on and not CPUID's leaf 1D. oneDNN then loads palette 0, and its first
    BF16 product ends the process with an illegal instruction. To be called before that product.
    """
    if platform.machine() != "x86_64" or not CPU_FLAGS.is_file() or WITHOUT_AMX[0] in os.environ:
        return
    if " amx_tile " in CPU_FLAGS.read_text() and _max_tile_palette() == 0:
        os.environ[WITHOUT_AMX[0]] = WITHOUT_AMX[1]


def _max_tile_palette() -> int | None:
    """CPUID's answer; None where the system runs no code that a program writes."""
    try:
        with mmap.mmap(-1, mmap.PAGESIZE, prot=mmap.PROT_READ | mmap.PROT_WRITE | mmap.PROT_EXEC) as page:
            page.write(MAX_TILE_PALETTE)
            byte = ctypes.c_char.from_buffer(page)
            palette: int = ctypes.CFUNCTYPE(ctypes.c_uint32)(ctypes.addressof(byte))()
            del byte  # a page that is looked into cannot be closed
            return palette
    except OSError:
        return None
