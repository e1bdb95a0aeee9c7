"""Files: reads and writes that bypass the page cache, hashes, and atomic replacement.

A large file that passes through the page cache evicts what was in it. Linux 6.14 can prevent that with RWF_DONTCACHE
(pwritev2(2)) on ext4, XFS and Btrfs; elsewhere these are plain reads and writes. It is also faster if free memory is
slow to get: a virtual machine that returns free memory to its host wrote 2.7 GB in 0.75 s instead of 4.6 s.
"""

import errno
import hashlib
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from nemotrt.exporter.errors import BundleError, UsageError

RWF_DONTCACHE = 0x80
"""Python 3.11 has no name for it."""

UNSUPPORTED = (errno.EOPNOTSUPP, errno.ENOSYS)

HASH_CHUNK = 4 << 20
"""Bytes that `sha256` reads at a time; with 1 MB a file that was not cached took 2.4 s instead of 1.5 s."""


def check_place(path: Path, bundle: Path) -> None:
    """Raise UsageError if no file can be written at the path.

    It has no folder, is inside the bundle, or is a pipe or a device, which may have no reader.
    """
    if not path.parent.is_dir():
        raise UsageError(f"{path.parent} is not a folder", hint="create it, or choose another path")
    if path.resolve().is_relative_to(bundle.resolve()):
        raise UsageError(
            f"{path} is inside the bundle",
            hint="a bundle contains only what its manifest lists; choose another path",
        )
    if path.exists() and not path.is_file():
        raise UsageError(f"{path} is not a regular file", hint="choose another path")


def read_into(buffer: memoryview, file: int, offset: int, *, keep: bool = False) -> int:
    """Fill the buffer from the file at `offset`; returns the number of bytes read, fewer at the file's end.

    With `keep`, the bytes stay in the page cache for whoever reads them next.
    """
    done, flags = 0, 0 if keep else RWF_DONTCACHE
    while done < len(buffer) and (count := _call(os.preadv, file, buffer[done:], offset + done, flags)):
        done += count
    return done


def write(data: memoryview, file: int, offset: int) -> None:
    """Write all of the data to the file at `offset`."""
    done = 0
    while done < len(data):
        done += _call(os.pwritev, file, data[done:], offset + done, RWF_DONTCACHE)


def is_hole(file: int, start: int, stop: int) -> bool:
    """Whether the file has no allocated bytes from `start` to `stop`, which then read as zeros."""
    try:
        return os.lseek(file, start, os.SEEK_DATA) >= stop
    except OSError as error:
        return error.errno == errno.ENXIO  # no data up to the end of the file


def sha256(path: Path) -> str:
    """The file's SHA-256 as hexadecimal digits; raises BundleError if it cannot be read."""
    digest, buffer, offset = hashlib.sha256(), memoryview(bytearray(HASH_CHUNK)), 0
    try:
        with path.open("rb", buffering=0) as file:
            while count := read_into(buffer, file.fileno(), offset):
                digest.update(buffer[:count])
                offset += count
    except OSError as error:
        raise BundleError(f"{path} cannot be read: {error.strerror}") from error
    return digest.hexdigest()


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A path in the same folder to write to: it replaces `path` at the end, or is removed if the block raises."""
    partial = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        yield partial
        sync(partial)
        partial.replace(path)
        sync(path.parent)
    finally:
        partial.unlink(missing_ok=True)


def write_atomic(path: Path, text: str) -> None:
    """Write a text file so that the whole file is on the disk or none of it."""
    with replacing(path) as partial:
        partial.write_text(text, encoding="utf-8")


def sync(path: Path) -> None:
    """Wait until a file's contents, or the entries of a folder, are on the disk."""
    file = os.open(path, os.O_RDONLY)
    try:
        os.fsync(file)
    finally:
        os.close(file)


def _call(call: Callable[..., int], file: int, data: memoryview, offset: int, flags: int) -> int:
    try:
        return call(file, [data], offset, flags)
    except NotImplementedError:  # not Linux
        pass
    except OSError as error:
        if error.errno not in UNSUPPORTED:
            raise
    return call(file, [data], offset)
