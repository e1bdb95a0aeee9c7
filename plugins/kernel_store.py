"""The cache of compiled kernels, outside the package, keyed by a hash of what each was compiled from.

The PTX that a cubin was assembled from lies next to it, by the cubin's hash. The emulator runs it; nothing ships it.
"""

import gzip
import hashlib
import json
import os
import tempfile
from pathlib import Path
from typing import Any

import platformdirs

CACHE_VARIABLE = "NEMO_EXPORT_CACHE"
"""The environment variable that overrides the cache folder."""


def cache_folder() -> Path:
    """The folder for everything that is cached: $NEMO_EXPORT_CACHE, or nemo-export in the user's cache folder."""
    override = os.environ.get(CACHE_VARIABLE)
    return Path(override).expanduser() if override else platformdirs.user_cache_path("nemo-export")


def write(path: Path, content: bytes) -> None:
    """Write a file atomically, even if another process writes the same one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    descriptor, temporary = tempfile.mkstemp(prefix=f".{path.name[:40]}-", dir=path.parent)
    try:
        with os.fdopen(descriptor, "wb") as file:
            file.write(content)
        Path(temporary).replace(path)
    finally:
        Path(temporary).unlink(missing_ok=True)


def digest(content: Any) -> str:
    """The SHA-256 of bytes, or of anything else written as JSON."""
    if not isinstance(content, bytes):
        content = json.dumps(content, sort_keys=True).encode()
    return hashlib.sha256(content).hexdigest()


class KernelStore:
    """A folder of cubins with their PTX, and of JSON notes by key; a damaged or incomplete entry counts as absent."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def put(self, key: str, cubin: bytes, ptx: str, facts: dict[str, Any]) -> None:
        """Store a cubin, the PTX that it was assembled from, and its facts, which include its sha256."""
        write(self._path(facts["sha256"], "ptx.gz"), gzip.compress(ptx.encode(), mtime=0))
        write(self._path(key, "cubin"), cubin)
        self.put_note(key, facts)

    def get(self, key: str) -> tuple[bytes, dict[str, Any]] | None:
        """The cubin and its facts, or None if they or the PTX are missing, or the cubin is damaged."""
        facts = self.get_note(key)
        path = self._path(key, "cubin")
        if not isinstance(facts, dict) or not path.is_file():
            return None
        cubin = path.read_bytes()
        sha256 = digest(cubin)
        is_whole = sha256 == facts.get("sha256") and self._path(sha256, "ptx.gz").is_file()
        return (cubin, facts) if is_whole else None

    def ptx(self, sha256: str) -> str:
        """The PTX that the cubin with this hash was assembled from; raises OSError if it is missing or damaged."""
        return gzip.decompress(self._path(sha256, "ptx.gz").read_bytes()).decode()

    def put_note(self, key: str, content: Any) -> None:
        """Store a note, which is anything that JSON can express."""
        write(self._path(key, "json"), json.dumps({"content": content, "digest": digest(content)}).encode())

    def get_note(self, key: str) -> Any | None:
        """The note under this key, or None if it is missing or damaged."""
        try:
            note = json.loads(self._path(key, "json").read_bytes())
        except (FileNotFoundError, ValueError):
            return None
        is_intact = isinstance(note, dict) and note.get("digest") == digest(note.get("content"))
        return note["content"] if is_intact else None

    def _path(self, key: str, suffix: str) -> Path:
        return self.folder / key[:2] / f"{key}.{suffix}"
