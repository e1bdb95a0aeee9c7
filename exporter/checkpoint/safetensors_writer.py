"""Safetensors files, written a piece at a time: sizes are known before any value is."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from nemotrt.exporter.checkpoint.safetensors_reader import DTYPES, INDEX, SINGLE

SHARD_BYTES = 5_000_000_000
"""As transformers cuts them."""

NAMES = {torch_name: (name, width) for name, (torch_name, width) in DTYPES.items()}


@dataclass(frozen=True)
class Entry:
    """A tensor to be written: torch's name of its dtype, its shape, and what gives its bytes in pieces."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    pieces: Callable[[], Iterator[bytes | bytearray]]

    @property
    def length(self) -> int:
        """Bytes of the values."""
        return math.prod(self.shape) * NAMES[self.dtype][1]


def write_shards(folder: Path, entries: Sequence[Entry]) -> None:
    """The entries in model.safetensors, or in several files and their index."""
    shards: list[list[Entry]] = [[]]
    filled = 0
    for entry in entries:
        if shards[-1] and filled + entry.length > SHARD_BYTES:
            shards.append([])
            filled = 0
        shards[-1].append(entry)
        filled += entry.length
    if len(shards) == 1:
        write_file(folder / SINGLE, shards[0])
        return
    weight_map: dict[str, str] = {}
    for number, shard in enumerate(shards, start=1):
        file = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        write_file(folder / file, shard)
        weight_map |= dict.fromkeys((entry.name for entry in shard), file)
    total = sum(entry.length for entry in entries)
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (folder / INDEX).write_text(json.dumps(index, indent=2), encoding="utf-8")


PYTORCH = {"format": "pt"}
"""What readers of checkpoints look for."""


def write_file(path: Path, entries: Sequence[Entry], metadata: Mapping[str, str] = PYTORCH) -> None:
    """The entries in one file, with text of one's own in its header."""
    header: dict[str, object] = {"__metadata__": dict(metadata)}
    position = 0
    for entry in entries:
        header[entry.name] = {
            "dtype": NAMES[entry.dtype][0],
            "shape": entry.shape,
            "data_offsets": [position, position + entry.length],
        }
        position += entry.length
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little"))
        file.write(text)
        for entry in entries:
            written = sum(file.write(piece) for piece in entry.pieces())
            assert written == entry.length, entry.name
