"""Open safetensors files: their headers are checked before any data is read, and data is read in pieces.

A file has 8 bytes of header length, a JSON header {name: {dtype, shape, data_offsets}}, and the tensors' bytes without
gaps or overlaps (https://huggingface.co/docs/safetensors). No file is mapped, so a piece at a time is in memory.
"""

import gc
import math
import os
import re
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, Self

from nemotrt.exporter.checkpoint.other_formats import other_format
from nemotrt.exporter.errors import CheckpointError
from nemotrt.exporter.runtime import files
from nemotrt.exporter.runtime.strict_json import parse_object, read_object
from nemotrt.plugins.contract import DType

PIECE_BYTES = 4 << 20
"""Bytes of a checkpoint that are read at a time. Pieces of 16 MiB take five times the CPU time."""

MAX_HEADER_BYTES = 100_000_000
"""The safetensors library's own limit."""

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
SUFFIX = ".safetensors"
SHARD = re.compile(r"(?P<stem>.+)-\d+-of-(?P<total>\d+)" + re.escape(SUFFIX))
"""A shard's name tells how many there are."""

LFS_POINTER = b"version https://git-lfs.github.com/"
"""The first bytes of a file whose content Git LFS has not downloaded yet."""


@dataclass(frozen=True)
class StoredTensor:
    """A tensor in a file: its `length` bytes start at `offset`."""

    name: str
    dtype: DType
    shape: tuple[int, ...]
    path: Path
    offset: int
    length: int

    def part(self, index: int) -> Self:
        """The part of the tensor at an index of its first axis."""
        length = self.length // self.shape[0]
        return replace(
            self,
            name=f"{self.name}[{index}]",
            shape=self.shape[1:],
            offset=self.offset + index * length,
            length=length,
        )


@contextmanager
def _garbage_collection_off() -> Iterator[None]:
    """Garbage collection takes half the time of opening a large checkpoint, and finds nothing."""
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()


@_garbage_collection_off()
def open_checkpoint(folder: Path) -> dict[str, StoredTensor]:
    """Every tensor of a checkpoint folder by name, from its single file or its shards; no data is read.

    Raises CheckpointError on a missing, truncated or malformed file, a name that two shards contain, an index that
    points outside the folder or disagrees with its shards, and a checkpoint in another format.
    """
    has_index, has_single = (os.path.lexists(folder / name) for name in (INDEX, SINGLE))
    if has_index:
        return _open_index(folder, has_single=has_single)
    if has_single:
        return read_header(file_inside(folder, SINGLE))
    if shards := _shards_without_index(folder):
        return _open_shards(folder, shards)
    if other := other_format(folder):
        raise other
    raise CheckpointError(
        f"{folder} has neither {SINGLE} nor {INDEX}",
        hint="pass a checkpoint folder in the Hugging Face layout",
    )


def _open_index(folder: Path, *, has_single: bool) -> dict[str, StoredTensor]:
    weight_map = read_json(file_inside(folder, INDEX)).get("weight_map")
    if not isinstance(weight_map, dict) or not all(isinstance(shard, str) for shard in weight_map.values()):
        raise CheckpointError(f"{INDEX}: weight_map does not map tensors to files")
    if has_single and SINGLE not in weight_map.values():
        raise CheckpointError(
            f"{folder} has both {SINGLE} and {INDEX}, which does not list it",
            hint="remove the one that is not the model's",
        )
    tensors = _open_shards(folder, set(weight_map.values()))
    for name, tensor in tensors.items():
        if (listed := weight_map.get(name, "nothing")) != tensor.path.name:
            raise CheckpointError(f"{name} is in {tensor.path.name}, but {INDEX} lists it in {listed}")
    for name, shard in weight_map.items():
        if name not in tensors:
            raise CheckpointError(f"{INDEX} lists {name} in {shard}, which does not contain it")
    return tensors


def _open_shards(folder: Path, shards: Collection[str]) -> dict[str, StoredTensor]:
    tensors: dict[str, StoredTensor] = {}
    for shard in sorted(shards):
        for name, tensor in read_header(file_inside(folder, shard)).items():
            if name in tensors:
                raise CheckpointError(f"{name} is in two shards: {tensors[name].path.name} and {shard}")
            tensors[name] = tensor
    return tensors


def _shards_without_index(folder: Path) -> list[str]:
    """The shards of a folder whose index is missing; raises CheckpointError if a shard is missing too."""
    found = {path.name: match for path in folder.iterdir() if (match := SHARD.fullmatch(path.name))}
    if not found:
        return []
    match = next(iter(found.values()))
    stem, total = match["stem"], match["total"]
    names = (f"{stem}-{n:0{len(total)}}-of-{total}{SUFFIX}" for n in range(1, int(total) + 1))
    missing = next((name for name in names if name not in found), "")
    if missing or len(found) > int(total):
        problem = (
            f"{missing} is missing" if missing else f"it has more shards than the {int(total)} of one model"
        )
        raise CheckpointError(f"{folder} has no {INDEX}, and {problem}", hint="download the checkpoint again")
    return sorted(found)


def file_inside(folder: Path, name: str) -> Path:
    """The path of the file `name` in the folder.

    Raises CheckpointError on a path, a missing file, and a link to anywhere else, because a build would copy its
    target. Links are followed to the blobs of a Hugging Face cache, and to the folder that config.json is a link into.
    """
    if Path(name).name != name:
        raise CheckpointError(f"{INDEX} lists {name}, which is not a file of {folder}")
    path = folder / name
    try:
        is_file = path.is_file()
    except OSError as error:  # the name is too long
        raise CheckpointError(f"{path} cannot be read: {error.strerror}") from error
    if not is_file:
        raise CheckpointError(
            f"{path} is {'not a regular file' if path.exists() else 'missing'}",
            hint="download the checkpoint again",
        )
    if path.is_symlink() and (target := path.resolve()).parent not in _trusted_folders(folder.resolve()):
        raise CheckpointError(
            f"{path} is a link to {target}, outside the checkpoint",
            hint="copy the file into the folder, or link config.json to the same folder too",
        )
    return path


def _trusted_folders(folder: Path) -> set[Path]:
    """The folders in which links of a checkpoint folder may end."""
    snapshots = (parent for parent in folder.parents if parent.name == "snapshots")
    blobs = {(parent.parent / "blobs").resolve() for parent in snapshots}
    return {folder, (folder / "config.json").resolve().parent} | blobs


def read_json(path: Path) -> dict[str, Any]:
    """The JSON object in a file of the checkpoint; raises CheckpointError as `read_object` does."""
    return read_object(path, CheckpointError)


def read_header(path: Path) -> dict[str, StoredTensor]:
    """Every tensor of one file by name; raises CheckpointError that names the file and the problem."""
    return read_header_and_metadata(path)[0]


def read_header_and_metadata(path: Path) -> tuple[dict[str, StoredTensor], dict[str, Any]]:
    """Like `read_header`, together with the header's `__metadata__`."""
    size = path.stat().st_size
    with path.open("rb") as file:
        prefix = file.read(8)
        if prefix == LFS_POINTER[:8]:
            raise CheckpointError(
                f"{path} is a Git LFS pointer, not the weights", hint="run git lfs pull in the folder"
            )
        header_bytes = int.from_bytes(prefix, "little")
        if len(prefix) < 8 or header_bytes > size - 8:
            raise CheckpointError(f"{path} is truncated: {size} bytes", hint="download it again")
        if header_bytes > MAX_HEADER_BYTES:
            raise CheckpointError(f"{path} has a header of {header_bytes} bytes, over {MAX_HEADER_BYTES}")
        text = file.read(header_bytes)
    header = parse_object(text, f"the header of {path}", partial(CheckpointError, hint="download it again"))
    metadata = header.pop("__metadata__", None)
    tensors = {name: _stored(path, name, entry, 8 + header_bytes) for name, entry in header.items()}
    _check_layout(path, tensors, 8 + header_bytes, size)
    return tensors, metadata if isinstance(metadata, dict) else {}


def _stored(path: Path, name: str, entry: Any, data_start: int) -> StoredTensor:
    try:
        shape, (begin, end) = tuple(entry["shape"]), entry["data_offsets"]
        dtype, numbers = str(entry["dtype"]), [*shape, begin, end]
    except (TypeError, KeyError, ValueError) as error:
        raise CheckpointError(f"{path}: {name} has no dtype, shape or data_offsets") from error
    if not all(type(number) is int and 0 <= number < 1 << 63 for number in numbers):
        raise CheckpointError(
            f"{path}: {name} has a shape or offset that is not a non-negative integer of 64 bits"
        )
    try:
        known_dtype = DType.lookup("safetensors", dtype)
    except ValueError as error:
        known = " ".join(dtype.safetensors for dtype in DType)
        raise CheckpointError(f"{path}: {name} has unknown dtype {dtype}", hint=f"known: {known}") from error
    if end - begin != math.prod(shape) * known_dtype.itemsize:
        raise CheckpointError(f"{path}: {name} is {dtype} {list(shape)}, but its bytes are {begin} to {end}")
    return StoredTensor(name, known_dtype, shape, path, data_start + begin, end - begin)


def _check_layout(path: Path, tensors: dict[str, StoredTensor], data_start: int, size: int) -> None:
    position = data_start
    for tensor in sorted(tensors.values(), key=lambda tensor: (tensor.offset, tensor.length)):
        if tensor.offset != position:
            what = "overlaps another tensor" if tensor.offset < position else "leaves a gap before it"
            raise CheckpointError(f"{path}: {tensor.name} {what}")
        position += tensor.length
    if position > size:
        raise CheckpointError(
            f"{path} is truncated: it has {size} bytes, its header promises {position}",
            hint="download it again",
        )
    if position < size:
        raise CheckpointError(f"{path} has {size - position} bytes that belong to no tensor")


def read_pieces(tensor: StoredTensor, piece_bytes: int | None = None) -> Iterator[bytearray]:
    """The tensor's bytes in order, in pieces of at most `piece_bytes` (PIECE_BYTES); the caller owns each piece."""
    size = piece_bytes or PIECE_BYTES
    with tensor.path.open("rb", buffering=0) as file:
        for start in range(0, tensor.length, size):
            piece = bytearray(min(size, tensor.length - start))
            read_into(memoryview(piece), tensor, file.fileno(), start, keep=True)
            yield piece


def read_into(buffer: memoryview, tensor: StoredTensor, file: int, start: int, *, keep: bool = False) -> None:
    """Fill the buffer with the tensor's bytes from `start`; its file is open as `file`, and `keep` as in `files`.

    Raises CheckpointError, which names the file and the tensor, if the disk fails or the file ends.
    """
    try:
        num_read = files.read_into(buffer, file, tensor.offset + start, keep=keep)
    except OSError as error:  # a disk's error names no file
        raise CheckpointError(f"{tensor.path}: {tensor.name} cannot be read: {error.strerror}") from error
    if num_read != len(buffer):
        raise CheckpointError(f"{tensor.path} ended while {tensor.name} was read")
