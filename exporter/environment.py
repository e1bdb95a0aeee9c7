"""What this machine has and can do, asked once and said in words."""

from __future__ import annotations

import platform
from importlib import metadata

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


def tool_versions() -> dict[str, str]:
    """The installed ones of PACKAGES → their versions, and Python's."""
    found = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    return found


def machine() -> dict[str, str]:
    """The operating system and the processor's architecture."""
    return {"os": platform.system(), "release": platform.release(), "arch": platform.machine()}
