"""Files are read, written and hashed alike with and without a system's bypass of the page cache, and replaced whole."""

from __future__ import annotations

import errno
import hashlib
import os
from collections.abc import Callable
from pathlib import Path

import pytest

from nemotrt.exporter.errors import BundleError
from nemotrt.exporter.runtime import files

CONTENT = bytes(range(256)) * 100


def refusing(refusal: BaseException, call: Callable[..., int], refused: list[int]) -> Callable[..., int]:
    """The system call as a system has it that does not know the flag; half of what it is asked for is done."""

    def instead(file: int, buffers: list[memoryview], offset: int, flags: int = 0) -> int:
        if flags:
            refused.append(flags)
            raise refusal
        return call(file, [buffers[0][: len(buffers[0]) // 2 + 1]], offset)

    return instead


@pytest.mark.parametrize(
    "refusal",
    [None, OSError(errno.EOPNOTSUPP, "?"), OSError(errno.ENOSYS, "?"), NotImplementedError()],
    ids=["as the system has it", "an older system", "an older yet", "not Linux"],
)
def test_every_byte_passes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, refusal: BaseException | None
) -> None:
    refused: list[int] = []
    for name in ("preadv", "pwritev") if refusal else ():
        assert refusal is not None
        monkeypatch.setattr(os, name, refusing(refusal, getattr(os, name), refused))
    path = tmp_path / "file"
    with path.open("w+b", buffering=0) as file:
        files.write(memoryview(CONTENT), file.fileno(), 7)
        buffer = memoryview(bytearray(len(CONTENT) + 10))
        assert files.read_into(buffer, file.fileno(), 7) == len(CONTENT)
    assert path.read_bytes() == bytes(7) + CONTENT
    assert buffer[: len(CONTENT)] == CONTENT
    assert files.sha256(path) == hashlib.sha256(bytes(7) + CONTENT).hexdigest()
    assert bool(refused) == bool(refusal)


def test_an_error_of_the_disk_is_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> int:
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(os, "pwritev", fail)
    with (tmp_path / "file").open("wb") as file, pytest.raises(OSError, match="Input/output error"):
        files.write(memoryview(CONTENT), file.fileno(), 0)


def test_a_file_is_replaced_whole_or_not_at_all(tmp_path: Path) -> None:
    path = tmp_path / "file"
    files.write_atomic(path, "first")

    def fail_halfway() -> None:
        with files.replacing(path) as partial:
            partial.write_text("sec")
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fail_halfway()
    assert path.read_text() == "first"
    files.write_atomic(path, "second")
    assert path.read_text() == "second"
    assert list(tmp_path.iterdir()) == [path]


def test_a_file_that_cannot_be_hashed_is_named(tmp_path: Path) -> None:
    with pytest.raises(BundleError, match=r"missing cannot be read: No such file"):
        files.sha256(tmp_path / "missing")
