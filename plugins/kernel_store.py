"""Compiled kernels by the hash of what they were compiled from, kept outside the package."""

from __future__ import annotations

import hashlib
import json
import os
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

CACHE_VARIABLE = "NEMO_EXPORT_CACHE"
"""Names the cache folder in the environment; without it, it is nemo-export in the user's cache folder."""


def cache_folder() -> Path:
    """Where kernels are kept: in $NEMO_EXPORT_CACHE, $XDG_CACHE_HOME/nemo-export or ~/.cache/nemo-export."""
    if chosen := os.environ.get(CACHE_VARIABLE):
        return Path(chosen).expanduser() / "kernels"
    home = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    return Path(home).expanduser() / "nemo-export" / "kernels"


def write(path: Path, content: bytes) -> None:
    """Write a file whole or not at all, even beside another process that writes the same one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    descriptor, temporary = tempfile.mkstemp(prefix=f".{path.name[:40]}-", dir=path.parent)
    try:
        with os.fdopen(descriptor, "wb") as file:
            file.write(content)
        Path(temporary).replace(path)
    finally:
        Path(temporary).unlink(missing_ok=True)


def digest(content: Any) -> str:
    """The SHA-256 of what JSON can say."""
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


@dataclass(frozen=True)
class KernelStore:
    """A folder of cubins and notes by key. What does not match its hash counts as absent."""

    folder: Path

    def put(self, key: str, cubin: bytes, entry: dict[str, Any]) -> None:
        """Keep a cubin; `entry` holds its sha256."""
        write(self._path(key, "cubin"), cubin)
        self.put_note(key, entry)

    def get(self, key: str) -> tuple[bytes, dict[str, Any]] | None:
        """The cubin and its entry, or None where they are not both there and whole."""
        entry = self.get_note(key)
        path = self._path(key, "cubin")
        if not isinstance(entry, dict) or not path.is_file():
            return None
        cubin = path.read_bytes()
        return (cubin, entry) if hashlib.sha256(cubin).hexdigest() == entry.get("sha256") else None

    def put_note(self, key: str, content: Any) -> None:
        """Keep what JSON can say."""
        text = json.dumps({"content": content, "digest": digest(content)})
        write(self._path(key, "json"), text.encode())

    def get_note(self, key: str) -> Any | None:
        """What was kept under the key, or None where it is not there and whole."""
        path = self._path(key, "json")
        if not path.is_file():
            return None
        try:
            note = json.loads(path.read_bytes())
        except ValueError:
            return None
        whole = isinstance(note, dict) and note.get("digest") == digest(note.get("content"))
        return note["content"] if whole else None

    def _path(self, key: str, suffix: str) -> Path:
        return self.folder / key[:2] / f"{key}.{suffix}"
