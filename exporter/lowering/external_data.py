"""Write a graph's external data with several threads, and resume a write that was interrupted.

Sparse regions of the checkpoint stay sparse: only bytes that are on disk are written.
"""

import fcntl
import os
import threading
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from functools import partial
from itertools import accumulate
from pathlib import Path

import torch

from nemotrt.exporter.checkpoint import safetensors_reader, weights
from nemotrt.exporter.checkpoint.parallel import in_order
from nemotrt.exporter.environment import num_cores
from nemotrt.exporter.errors import UsageError
from nemotrt.exporter.lowering.data_layout import Piece, Placed, data_bytes, is_hole, pieces
from nemotrt.exporter.progress import Advance
from nemotrt.exporter.runtime import files

SYNC_BYTES = 1 << 28
"""Bytes that are written between two syncs of the data file."""

FICLONE = 0x40049409
"""The ioctl that makes a file share another's blocks, copy-on-write: see ioctl_ficlone(2)."""

MAX_GROWTH = 4
"""Factor by which a conversion can grow a piece: from FP8 to FP32."""


def write(
    path: Path,
    placed: tuple[Placed, ...],
    *,
    resume_from: int = 0,
    advance: Advance,
    synced: Callable[[int], None],
) -> int:
    """Write the data file, check the linked parameters too, and return the number of bytes written.

    Progress counts the parameters' bytes in the order of `placed`, linked ones included: `advance` is called with each
    increment, `synced` with the total that has reached the disk. `resume_from` is the last total that an interrupted
    write reported to `synced`. Raises CheckpointError as `weights.convert_piece` does.
    """
    all_pieces = list(pieces(placed))
    ends = accumulate(piece.length for piece in all_pieces)
    remaining = [piece for piece, end in zip(all_pieces, ends, strict=True) if end > resume_from]
    written, position = 0, resume_from
    with (
        path.open("r+b" if resume_from else "wb") as file,
        ThreadPoolExecutor(num_cores() + 1, initializer=partial(torch.set_num_threads, 1)) as pool,
    ):
        file.truncate(data_bytes(placed))
        advance(resume_from)
        syncer = _Syncer(pool, file.fileno(), synced)
        try:
            for piece, piece_written in in_order(pool, partial(_transfer, file.fileno()), remaining):
                written += piece_written
                position += piece.length
                advance(piece.length)
                syncer.reached(position, piece_written)
        finally:
            pool.shutdown(cancel_futures=True)
    return written


class _Syncer:
    """Syncs the file in the background from time to time, and reports the progress that is on disk."""

    def __init__(self, pool: ThreadPoolExecutor, file: int, synced: Callable[[int], None]) -> None:
        self._pool, self._file, self._synced = pool, file, synced
        self._position = self._written = 0
        self._sync: Future[None] | None = None

    def reached(self, position: int, written: int) -> None:
        """All bytes before `position` are in the file; `written` of them are new."""
        self._written += written
        if self._sync is not None and self._sync.done():
            self._sync.result()
            self._synced(self._position)
            self._sync = None
        if self._sync is None and self._written >= SYNC_BYTES:
            self._position, self._written = position, 0
            self._sync = self._pool.submit(os.fdatasync, self._file)


class _Buffers(threading.local):
    """A thread's own memory for a piece; allocating it for each piece would take as long as reading."""

    def __init__(self) -> None:
        self.stored = memoryview(bytearray(safetensors_reader.PIECE_BYTES))
        self.converted = torch.empty(MAX_GROWTH * safetensors_reader.PIECE_BYTES, dtype=torch.uint8)


_buffers = _Buffers()
_writing = threading.Lock()
"""The kernel lets one thread at a time write to a file; the others would spin on a core that can convert."""


def _transfer(target: int, piece: Piece) -> int:
    """Read, check, convert and write a piece; returns the bytes written."""
    placed, tensor = piece.placed, piece.tensor
    if tensor is None:
        values = torch.cat(list(weights.values(placed.source, placed.shape, placed.dtype)))
        return _write(target, values, piece.offset)
    with tensor.path.open("rb", buffering=0) as file:
        if is_hole(file.fileno(), piece):
            return 0
        stored = _buffers.stored[: piece.stop - piece.start]
        safetensors_reader.read_into(stored, tensor, file.fileno(), piece.start)
    values = weights.convert_piece(tensor, stored, placed.source.transform, placed.dtype, _buffers.converted)
    return 0 if placed.linked else _write(target, values, piece.offset)


def _write(target: int, values: torch.Tensor, offset: int) -> int:
    data = values.view(torch.uint8).numpy().data
    with _writing:
        files.write(data, target, offset)
    return len(data)


def link(shard: Path, folder: Path) -> None:
    """Put the shard into the folder under its own name, without copying its bytes.

    The file system clones it (XFS, Btrfs), or else it becomes a hard link. Raises UsageError when neither is possible.
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
