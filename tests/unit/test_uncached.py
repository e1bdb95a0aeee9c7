"""Files that pass without staying in the page cache: the same bytes, where the system can and where it cannot."""

from __future__ import annotations

import errno
import hashlib
import os
from collections.abc import Callable
from pathlib import Path

import pytest

from nemotrt.exporter.runtime import uncached

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
        uncached.write(memoryview(CONTENT), file.fileno(), 7)
        buffer = memoryview(bytearray(len(CONTENT) + 10))
        assert uncached.read_into(buffer, file.fileno(), 7) == len(CONTENT)
    assert path.read_bytes() == bytes(7) + CONTENT
    assert buffer[: len(CONTENT)] == CONTENT
    assert uncached.sha256(path) == hashlib.sha256(bytes(7) + CONTENT).hexdigest()
    assert bool(refused) == bool(refusal)


def test_an_error_of_the_disk_is_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> int:
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(os, "pwritev", fail)
    with (tmp_path / "file").open("wb") as file, pytest.raises(OSError, match="Input/output error"):
        uncached.write(memoryview(CONTENT), file.fileno(), 0)
