"""The plugin library that a platform wheel carries: an installation from one needs no compiler and no Triton."""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
from pathlib import Path

from nemotrt.plugins.library import PluginError, PluginLibrary
from nemotrt.plugins.link import DESCRIPTION_NAME, LIBRARY_NAME

FOLDER = Path(__file__).parent / "prebuilt"
"""Where `scripts/make_wheel.py` puts the library and its description; not there in a checkout."""


def is_shipped() -> bool:
    """Whether this installation has a library of its own."""
    return FOLDER.is_dir()


def shipped_library() -> PluginLibrary:
    """The installation's own library, loaded; raises PluginError where it is not what was shipped, to the byte."""
    path = FOLDER / LIBRARY_NAME
    try:
        note = json.loads((FOLDER / DESCRIPTION_NAME).read_bytes())
        content = path.read_bytes()
        shipped, version, build = note["sha256"], note["version"], note["hash"]
    except (OSError, ValueError, KeyError) as error:
        raise PluginError(
            f"{FOLDER} is not as it was installed ({error!r}): install nemo-export again"
        ) from None
    if hashlib.sha256(content).hexdigest() != shipped:
        raise PluginError(f"{path} was changed after it was installed: install nemo-export again")
    installed = importlib.metadata.version("nemo-export")
    if version != installed:
        raise PluginError(
            f"{path} is of nemo-export {version}, this is {installed}: install nemo-export again"
        )
    return PluginLibrary(path, build)
