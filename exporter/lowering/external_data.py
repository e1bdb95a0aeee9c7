"""A graph's external data: laid out first, then written by several threads, in an order that can be gone on with.

What a tensor's file has as a hole stays one: of a sparse checkpoint only the bytes that are there are written.
"""

from __future__ import annotations

import errno
import fcntl
import math
import os
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch

from nemotrt.exporter.checkpoint import weights
from nemotrt.exporter.checkpoint.loaded_model import WeightSource
from nemotrt.exporter.checkpoint.safetensors_reader import StoredTensor
from nemotrt.exporter.environment import num_cores
from nemotrt.exporter.errors import CheckpointError, UsageError
from nemotrt.exporter.progress import Advance
from nemotrt.exporter.runtime import uncached

ALIGNMENT = 4096
"""Tensors start on a page, so that a runtime can map each of them."""

PENDING = 16
"""Pieces under way or waiting: enough for every thread, and little to wait for when a build is interrupted."""

KEPT_BYTES = 1 << 28
"""How much is written between two records of how far it is."""

FICLONE = 0x40049409
"""The ioctl that makes a file share another's blocks until either is written: see ioctl_ficlone(2)."""

MOST_WIDENED = 4
"""Times the bytes that a piece may grow to: from FP8 to FP32."""


@dataclass(frozen=True)
class Placed:
    """A parameter and where its bytes lie: in the data file, or in the checkpoint's own (`linked`)."""

    source: WeightSource
    shape: tuple[int, ...]
    dtype: torch.dtype
    offset: int
    linked: Path | None = None

    @property
    def length(self) -> int:
        """Bytes."""
        return math.prod(self.shape) * self.dtype.itemsize


def data_path(graph: Path) -> Path:
    """Where a graph's external data lies: beside it, so that every ONNX reader accepts it."""
    return graph.with_name(graph.name + ".data")


def lay_out(parameters: Iterable[weights.Wanted], *, link: bool) -> tuple[Placed, ...]:
    """Where each parameter goes; with `link`, one that the checkpoint holds as it is wanted stays there."""
    placed = []
    end = 0
    for source, shape, dtype in parameters:
        if link and weights.lies_as_wanted(source, dtype):
            (tensor,) = source.tensors
            placed.append(Placed(source, shape, dtype, tensor.offset, tensor.path))
        else:
            offset = -(-end // ALIGNMENT) * ALIGNMENT
            placed.append(Placed(source, shape, dtype, offset))
            end = offset + placed[-1].length
    return tuple(placed)


def end_of(placed: Iterable[Placed]) -> int:
    """Bytes of the data file."""
    return max((one.offset + one.length for one in placed if one.linked is None), default=0)


def write(
    path: Path,
    placed: tuple[Placed, ...],
    *,
    done: int = 0,
    advance: Advance,
    keep: Callable[[int], None],
) -> int:
    """Write the data file, and judge what stays in the checkpoint; gives the bytes that were written.

    Values are judged as `weights.converted` does. Bytes pass in the order of `placed`, the linked ones too: `advance`
    hears of them, `keep` of how many are behind what is on the disk for good, and `done` says what it heard last.
    """
    pieces = list(_left(placed, done))
    written = 0
    with (
        path.open("r+b" if done else "wb") as file,
        ThreadPoolExecutor(num_cores() + 1, initializer=partial(torch.set_num_threads, 1)) as pool,
    ):
        file.truncate(end_of(placed))
        advance(done)
        kept = _Kept(pool, file.fileno(), keep)
        passed = done
        try:
            for piece, new in _in_order(pool, pieces, file.fileno()):
                written += new
                advance(piece.end - piece.begin)
                passed += piece.end - piece.begin
                kept.reached(passed, new)
        finally:
            pool.shutdown(cancel_futures=True)
    return written


def _left(placed: Iterable[Placed], done: int) -> Iterator[_Piece]:
    """The pieces that are not among the first `done` bytes."""
    passed = 0
    for one in placed:
        for piece in _pieces(one):
            passed += piece.end - piece.begin
            if passed > done:
                yield piece


class _Kept:
    """Brings the file to the disk now and then, beside the writing, and tells how far it is there."""

    def __init__(self, pool: ThreadPoolExecutor, file: int, keep: Callable[[int], None]) -> None:
        self._pool, self._file, self._keep = pool, file, keep
        self._passed = self._written = 0
        self._syncing: Future[None] | None = None

    def reached(self, passed: int, written: int) -> None:
        """All of the first `passed` bytes are where they belong, for the last of which `written` had to be written."""
        self._written += written
        if self._syncing is not None and self._syncing.done():
            self._syncing.result()
            self._keep(self._passed)
            self._syncing = None
        if self._syncing is None and self._written >= KEPT_BYTES:
            self._passed, self._written = passed, 0
            self._syncing = self._pool.submit(os.fdatasync, self._file)


@dataclass(frozen=True)
class _Piece:
    """Some of a parameter's bytes: from `begin` to `end` in the data file, or in the checkpoint's own."""

    placed: Placed
    begin: int
    end: int
    tensor: StoredTensor | None = None
    """What they come from, from its byte `start` on; None for a parameter that is made at once."""
    start: int = 0
    stop: int = 0


def _pieces(placed: Placed) -> Iterator[_Piece]:
    """A parameter in pieces of stored tensors where values keep their order, else as a whole."""
    if placed.source.transform not in weights.UNCHANGED:
        yield _Piece(placed, placed.offset, placed.offset + placed.length)
        return
    position = placed.offset
    for tensor in placed.source.tensors:
        width = getattr(torch, tensor.dtype).itemsize
        for start in range(0, tensor.length, weights.PIECE_BYTES):
            stop = min(start + weights.PIECE_BYTES, tensor.length)
            end = position + (stop - start) // width * placed.dtype.itemsize
            yield _Piece(placed, position, end, tensor, start, stop)
            position = end
    assert position == placed.offset + placed.length, placed.source.parameter


def _in_order(pool: ThreadPoolExecutor, pieces: list[_Piece], target: int) -> Iterator[tuple[_Piece, int]]:
    """Each piece with the bytes written for it, in order, some of them at a time."""
    waiting: deque[tuple[_Piece, Future[int]]] = deque()
    for piece in pieces:
        waiting.append((piece, pool.submit(_transfer, piece, target)))
        if len(waiting) >= PENDING:
            done, future = waiting.popleft()
            yield done, future.result()
    for done, future in waiting:
        yield done, future.result()


class _Buffer(threading.local):
    """A thread's own memory for a piece: fresh memory for each costs as much time as reading it."""

    def __init__(self) -> None:
        self.view = memoryview(bytearray(weights.PIECE_BYTES))
        self.room = torch.empty(MOST_WIDENED * weights.PIECE_BYTES, dtype=torch.uint8)


_buffer = _Buffer()
_writing = threading.Lock()
"""A file takes one writer at a time: threads that wait for it in the kernel burn a core that could convert."""


def _transfer(piece: _Piece, target: int) -> int:
    """Read, judge, convert and write one piece; gives the bytes written."""
    placed, tensor = piece.placed, piece.tensor
    if tensor is None:
        found = torch.cat(list(weights.values(placed.source, placed.shape, placed.dtype)))
        return _write(target, found, piece.begin)
    with tensor.path.open("rb", buffering=0) as file:
        begin, length = tensor.offset + piece.start, piece.stop - piece.start
        if is_hole(file.fileno(), begin, begin + length):
            return 0
        stored = _buffer.view[:length]
        if uncached.read_into(stored, file.fileno(), begin) != length:
            raise CheckpointError(f"{tensor.path} ended while {tensor.name} was read")
    found = weights.converted(tensor, stored, placed.source.transform, placed.dtype, _buffer.room)
    if placed.linked is not None:
        return 0
    return _write(target, found, piece.begin)


def _write(target: int, found: torch.Tensor, offset: int) -> int:
    data = found.view(torch.uint8).numpy().data
    with _writing:
        uncached.write(data, target, offset)
    return len(data)


def num_real(placed: Iterable[Placed]) -> int:
    """Bytes of the parameters, without those that a sparse checkpoint has as holes."""
    total = 0
    with ExitStack() as stack:
        files: dict[Path, int] = {}
        for piece in (piece for one in placed for piece in _pieces(one)):
            tensor = piece.tensor
            if tensor is not None:
                if tensor.path not in files:
                    files[tensor.path] = stack.enter_context(tensor.path.open("rb", buffering=0)).fileno()
                begin = tensor.offset
                if is_hole(files[tensor.path], begin + piece.start, begin + piece.stop):
                    continue
            total += piece.end - piece.begin
    return total


def is_hole(file: int, begin: int, end: int) -> bool:
    """Whether nothing is stored there: it reads as zeros."""
    try:
        return os.lseek(file, begin, os.SEEK_DATA) >= end
    except OSError as error:
        return error.errno == errno.ENXIO  # no data up to the end of the file


def link(shard: Path, folder: Path) -> None:
    """The shard's content in the folder under its own name, and no byte copied.

    A clone where the file system has them (XFS, Btrfs), which is a file of its own, else a hard link. Raises UsageError
    where neither can be.
    """
    target, source = folder / shard.name, shard.resolve()
    target.unlink(missing_ok=True)
    with target.open("wb") as new, source.open("rb") as old, suppress(OSError):
        fcntl.ioctl(new, FICLONE, old.fileno())
        return
    target.unlink()
    try:
        os.link(source, target)
    except OSError as error:
        raise UsageError(
            f"{shard} cannot be linked into {folder}: {error.strerror}",
            hint="use --weights copy, or an --output on the checkpoint's own disk",
        ) from error
