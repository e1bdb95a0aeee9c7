"""Lay out a graph's external data: the place of each parameter, and the pieces in which it is written.

Nothing is read or written, so that `check` can tell the size of a build without PyTorch.
"""

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from nemotrt.exporter.checkpoint import safetensors_reader
from nemotrt.exporter.checkpoint.loaded_model import IN_ORDER, Parameter, WeightSource
from nemotrt.exporter.checkpoint.safetensors_reader import StoredTensor
from nemotrt.exporter.runtime import files
from nemotrt.plugins.contract import DType

ALIGNMENT = 4096
"""Tensors start on a page, so that a runtime can map each of them."""


@dataclass(frozen=True)
class Placed:
    """A parameter and the place of its bytes: in the data file, or in the checkpoint's file `linked`."""

    source: WeightSource
    shape: tuple[int, ...]
    dtype: DType
    offset: int
    linked: Path | None = None

    @property
    def length(self) -> int:
        """Bytes."""
        return math.prod(self.shape) * self.dtype.itemsize


class Piece(NamedTuple):
    """Some bytes of a parameter."""

    placed: Placed
    offset: int
    """Where the bytes begin in the data file, or in the checkpoint's file."""
    length: int
    tensor: StoredTensor | None = None
    """The stored tensor whose bytes from `start` to `stop` are converted; None for a parameter written at once."""
    start: int = 0
    stop: int = 0


def data_path(graph: Path) -> Path:
    """The path of a graph's external data: ONNX readers only accept it next to the graph."""
    return graph.with_name(graph.name + ".data")


def lay_out(parameters: Iterable[Parameter], *, link: bool) -> tuple[Placed, ...]:
    """The place of each parameter; with `link`, a parameter that needs no conversion stays in the checkpoint's file."""
    placed = []
    end = 0
    for source, shape, dtype in parameters:
        if link and source.is_stored_as(dtype):
            (tensor,) = source.tensors
            placed.append(Placed(source, shape, dtype, tensor.offset, tensor.path))
        else:
            offset = -(-end // ALIGNMENT) * ALIGNMENT
            placed.append(Placed(source, shape, dtype, offset))
            end = offset + placed[-1].length
    return tuple(placed)


def data_bytes(placed: Iterable[Placed]) -> int:
    """The size of the data file."""
    return max((place.offset + place.length for place in placed if place.linked is None), default=0)


def pieces(placed: Iterable[Placed]) -> Iterator[Piece]:
    """Pieces of stored tensors where values keep their order; other parameters as a whole."""
    for place in placed:
        if place.source.transform not in IN_ORDER:
            yield Piece(place, place.offset, place.length)
            continue
        offset = place.offset
        for tensor in place.source.tensors:
            for start in range(0, tensor.length, safetensors_reader.PIECE_BYTES):
                stop = min(start + safetensors_reader.PIECE_BYTES, tensor.length)
                length = (stop - start) // tensor.dtype.itemsize * place.dtype.itemsize
                yield Piece(place, offset, length, tensor, start, stop)
                offset += length
        assert offset == place.offset + place.length


def allocated_bytes(placed: Iterable[Placed]) -> int:
    """Bytes of the parameters, without the sparse regions of the checkpoint."""
    total = 0
    for piece in pieces(placed):
        if piece.tensor:
            with piece.tensor.path.open("rb", buffering=0) as file:
                if is_hole(file.fileno(), piece):
                    continue
        total += piece.length
    return total


def is_hole(file: int, piece: Piece) -> bool:
    """Whether the stored tensor's file has no allocated bytes for the piece, which then reads as zeros."""
    assert piece.tensor is not None
    offset = piece.tensor.offset
    return files.is_hole(file, offset + piece.start, offset + piece.stop)
