"""The plugin library that a platform wheel contains, so that an installation needs no compiler and no Triton."""

from __future__ import annotations

import importlib.metadata
import json
from pathlib import Path

from nemotrt.plugins.kernel_store import digest
from nemotrt.plugins.library import PluginError, PluginLibrary
from nemotrt.plugins.link import DESCRIPTION_NAME, LIBRARY_NAME

FOLDER = Path(__file__).parent / "prebuilt"
"""The folder of the library and its description, made by `scripts/make_wheel.py`; absent in a checkout."""


def is_shipped() -> bool:
    """Whether this installation contains a plugin library."""
    return FOLDER.is_dir()


def shipped_library() -> PluginLibrary:
    """The installation's library, loaded; raises PluginError if it differs from what was shipped."""
    path = FOLDER / LIBRARY_NAME
    try:
        note = json.loads((FOLDER / DESCRIPTION_NAME).read_bytes())
        content = path.read_bytes()
        sha256, version, build = note["sha256"], note["version"], note["hash"]
    except (OSError, ValueError, KeyError) as error:
        raise PluginError(f"{FOLDER} is damaged ({error!r}): install nemo-export again") from None
    if digest(content) != sha256:
        raise PluginError(f"{path} has changed since it was installed: install nemo-export again")
    installed = importlib.metadata.version("nemo-export")
    if version != installed:
        raise PluginError(
            f"{path} belongs to nemo-export {version}, not to {installed}: install nemo-export again"
        )
    return PluginLibrary(path, build)
