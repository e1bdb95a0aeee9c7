"""Safetensors files, opened strictly and read in pieces: headers are judged before a byte of data is touched.

The format: 8 bytes of header length, a JSON header {name: {dtype, shape, data_offsets}}, then the tensors' bytes,
without holes or overlaps (https://huggingface.co/docs/safetensors). Nothing here maps a file, so that memory is
bounded by the piece that is asked for.
"""

from __future__ import annotations

import gc
import json
import math
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nemotrt.exporter.errors import CheckpointError

MAX_HEADER_BYTES = 100_000_000
"""What the safetensors library accepts: a longer header is an attack or a truncation, not a model."""

DTYPES = {
    "F64": ("float64", 8),
    "F32": ("float32", 4),
    "F16": ("float16", 2),
    "BF16": ("bfloat16", 2),
    "F8_E4M3": ("float8_e4m3fn", 1),
    "F8_E5M2": ("float8_e5m2", 1),
    "F8_E8M0": ("float8_e8m0fnu", 1),
    "I64": ("int64", 8),
    "I32": ("int32", 4),
    "I16": ("int16", 2),
    "I8": ("int8", 1),
    "U8": ("uint8", 1),
    "BOOL": ("bool", 1),
}
"""The format's dtype → torch's name and bytes an element."""

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
PICKLES = (".bin", ".pt", ".pth", ".ckpt")

LFS_POINTER = b"version https://git-lfs.github.com/"
"""What a file begins with where Git LFS has not put the content in its place yet."""


@dataclass(frozen=True)
class StoredTensor:
    """A tensor as it lies in a file: `length` bytes from `offset` on."""

    name: str
    dtype: str
    """torch's name: bfloat16, float8_e4m3fn."""
    shape: tuple[int, ...]
    path: Path
    offset: int
    length: int


@contextmanager
def _uncollected() -> Iterator[None]:
    """Without looks for garbage: among a large checkpoint's tensors, which are none, they take half the time."""
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()


@_uncollected()
def open_checkpoint(folder: Path) -> dict[str, StoredTensor]:
    """Every tensor of a checkpoint folder by name, from its index or its one file; no tensor is read.

    Raises CheckpointError on a missing, truncated or malformed file, a name that two shards hold, an index that
    points outside the folder or disagrees with its shards, and on checkpoints that only hold pickles.
    """
    if os.path.lexists(folder / INDEX) and os.path.lexists(folder / SINGLE):
        raise CheckpointError(
            f"{folder} has both {SINGLE} and {INDEX}", hint="remove the one that is not the model's"
        )
    if os.path.lexists(folder / INDEX):
        return _open_index(folder)
    if os.path.lexists(folder / SINGLE):
        return read_header(file_inside(folder, SINGLE))
    pickles = sorted(path.name for path in folder.iterdir() if path.suffix in PICKLES)
    if pickles:
        raise CheckpointError(
            f"{folder} holds only pickled weights ({pickles[0]}), which can run code when loaded",
            hint="convert them with transformers: model.save_pretrained(folder) writes safetensors",
        )
    raise CheckpointError(
        f"{folder} has neither {SINGLE} nor {INDEX}",
        hint="name a checkpoint folder in the Hugging Face layout",
    )


def _open_index(folder: Path) -> dict[str, StoredTensor]:
    raw = read_json(file_inside(folder, INDEX))
    weight_map = raw.get("weight_map")
    if not isinstance(weight_map, dict) or not all(isinstance(shard, str) for shard in weight_map.values()):
        raise CheckpointError(f"{INDEX}: weight_map is not a map from tensor to file")
    tensors: dict[str, StoredTensor] = {}
    for shard in sorted(set(weight_map.values())):
        found = read_header(file_inside(folder, shard))
        for name, tensor in found.items():
            if name in tensors:
                raise CheckpointError(f"{name} is in two shards: {tensors[name].path.name} and {shard}")
            if weight_map.get(name) != shard:
                listed = weight_map.get(name, "nothing")
                raise CheckpointError(f"{name} is in {shard}, but {INDEX} lists it in {listed}")
            tensors[name] = tensor
    for name, shard in weight_map.items():
        if name not in tensors:
            raise CheckpointError(f"{INDEX} lists {name} in {shard}, which does not hold it")
    return tensors


def file_inside(folder: Path, name: str) -> Path:
    """The file `name` of the folder; a link only where the Hugging Face cache keeps its blobs.

    Raises CheckpointError on a path, a missing file, and a link that leads out: a build would copy what it leads to.
    """
    if Path(name).name != name:
        raise CheckpointError(f"{INDEX} names {name}, which is not a file of {folder}")
    path = folder / name
    if not path.is_file():
        raise CheckpointError(f"{path} is missing", hint="download the checkpoint again")
    if path.is_symlink():
        target = path.resolve()
        blobs = (folder.resolve().parent.parent / "blobs").resolve()
        if target.parent not in (folder.resolve(), blobs):
            raise CheckpointError(
                f"{path} is a link to {target}, outside the checkpoint",
                hint="copy the file into the folder; only links into a Hugging Face cache's blobs are followed",
            )
    return path


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object without duplicate keys; raises CheckpointError that names the file and the place."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"), object_pairs_hook=_unique_keys)
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path} is not valid JSON: {error}") from error
    if not isinstance(found, dict):
        raise CheckpointError(f"{path} is not a JSON object")
    return found


def _unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        names = [name for name, _ in pairs]
        duplicate = next(name for name in names if names.count(name) > 1)
        raise ValueError(f"duplicate key {duplicate}")
    return found


def read_header(path: Path) -> dict[str, StoredTensor]:
    """Every tensor of one file by name; raises CheckpointError that names the file and what is wrong with it."""
    return read_header_and_metadata(path)[0]


def read_header_and_metadata(path: Path) -> tuple[dict[str, StoredTensor], dict[str, Any]]:
    """As `read_header`, and the text that the file's writer put beside the tensors."""
    size = path.stat().st_size
    with path.open("rb") as file:
        prefix = file.read(8)
        if prefix == LFS_POINTER[:8]:
            raise CheckpointError(
                f"{path} is Git LFS's pointer to the weights, not the weights",
                hint="git lfs pull fetches them",
            )
        header_bytes = int.from_bytes(prefix, "little")
        if len(prefix) < 8 or header_bytes > size - 8:
            raise CheckpointError(f"{path} is truncated: {size} bytes", hint="download it again")
        if header_bytes > MAX_HEADER_BYTES:
            raise CheckpointError(f"{path} has a header of {header_bytes} bytes, over {MAX_HEADER_BYTES}")
        text = file.read(header_bytes)
    try:
        header = json.loads(text, object_pairs_hook=_unique_keys)
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path} has a malformed header: {error}", hint="download it again") from error
    if not isinstance(header, dict):
        raise CheckpointError(f"{path} has a header that is not a JSON object")
    metadata = header.pop("__metadata__", None)
    tensors = {name: _stored(path, name, entry, 8 + header_bytes) for name, entry in header.items()}
    _check_layout(path, tensors, 8 + header_bytes, size)
    return tensors, metadata if isinstance(metadata, dict) else {}


def _stored(path: Path, name: str, entry: Any, data_start: int) -> StoredTensor:
    try:
        dtype, shape, (begin, end) = entry["dtype"], tuple(entry["shape"]), entry["data_offsets"]
        numbers = [*shape, begin, end]
    except (TypeError, KeyError, ValueError) as error:
        raise CheckpointError(f"{path}: {name} has no dtype, shape or data_offsets") from error
    if not all(type(number) is int and number >= 0 for number in numbers):
        raise CheckpointError(f"{path}: {name} has a shape or offset that is not a count")
    if not isinstance(dtype, str) or dtype not in DTYPES:
        raise CheckpointError(
            f"{path}: {name} has dtype {dtype}, which is not known", hint="known: " + " ".join(DTYPES)
        )
    torch_name, width = DTYPES[dtype]
    if end - begin != math.prod(shape) * width:
        raise CheckpointError(f"{path}: {name} is {dtype} {list(shape)}, but its bytes are {begin} to {end}")
    return StoredTensor(name, torch_name, shape, path, data_start + begin, end - begin)


def _check_layout(path: Path, tensors: dict[str, StoredTensor], data_start: int, size: int) -> None:
    position = data_start
    for tensor in sorted(tensors.values(), key=lambda tensor: (tensor.offset, tensor.length)):
        if tensor.offset != position:
            what = "overlaps another tensor" if tensor.offset < position else "leaves a hole before it"
            raise CheckpointError(f"{path}: {tensor.name} {what}")
        position += tensor.length
    if position > size:
        raise CheckpointError(
            f"{path} is truncated: {size} bytes, its header promises {position}", hint="download it again"
        )
    if position < size:
        raise CheckpointError(f"{path} has {size - position} bytes that belong to no tensor")


def read_pieces(tensor: StoredTensor, piece_bytes: int) -> Iterator[bytearray]:
    """The tensor's bytes in order, in pieces of at most `piece_bytes`; a piece is the caller's to keep."""
    with tensor.path.open("rb", buffering=0) as file:
        file.seek(tensor.offset)
        left = tensor.length
        while left:
            piece = bytearray(min(piece_bytes, left))
            read = file.readinto(piece)
            if read != len(piece):
                raise CheckpointError(f"{tensor.path} ended while {tensor.name} was read")
            yield piece
            left -= read
