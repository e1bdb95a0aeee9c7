"""Write safetensors files piece by piece: all sizes are known before any value is."""

import json
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from nemotrt.exporter.checkpoint.safetensors_reader import INDEX, SINGLE
from nemotrt.plugins.contract import DType

SHARD_BYTES = 5_000_000_000
"""The size of the shards that transformers writes."""

METADATA = {"format": "pt"}
"""What readers of checkpoints expect in the header."""


@dataclass(frozen=True)
class Entry:
    """A tensor to write; `pieces` yields its bytes in order."""

    name: str
    dtype: DType
    shape: tuple[int, ...]
    pieces: Callable[[], Iterator[bytes | bytearray]]

    @property
    def length(self) -> int:
        """Bytes of the values."""
        return math.prod(self.shape) * self.dtype.itemsize


def write_shards(folder: Path, entries: Sequence[Entry]) -> None:
    """Write the entries to model.safetensors, or to several files and their index."""
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


def write_file(path: Path, entries: Sequence[Entry], metadata: Mapping[str, str] = METADATA) -> None:
    """Write the entries to one file, with `metadata` in its header."""
    header: dict[str, object] = {"__metadata__": dict(metadata)}
    position = 0
    for entry in entries:
        end = position + entry.length
        header[entry.name] = {
            "dtype": entry.dtype.safetensors,
            "shape": entry.shape,
            "data_offsets": [position, end],
        }
        position = end
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little"))
        file.write(text)
        for entry in entries:
            written = sum(file.write(piece) for piece in entry.pieces())
            assert written == entry.length, entry.name
