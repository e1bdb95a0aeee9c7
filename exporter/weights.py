"""Streams weights from a checkpoint to a graph's external data, a piece at a time, judging every value on its way."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import torch
from torch import Tensor

from nemotrt.exporter.artifacts import WeightSource
from nemotrt.exporter.config import PRECISION_OF_DTYPE
from nemotrt.exporter.errors import CheckpointError
from nemotrt.exporter.tensor_files import StoredTensor, read_pieces
from nemotrt.model.checkpoint import Transform

PIECE_BYTES = 4 << 20
"""What is in memory of a checkpoint at any time, times a small factor; 16 MiB pieces cost five times the CPU time."""

ALIGNMENT = 4096
"""Tensors start on a page, so that a runtime can map each of them."""


INFINITY_BITS: dict[torch.dtype, tuple[Any, int]] = {
    torch.float64: (np.uint64, 0x7FF0_0000_0000_0000),
    torch.float32: (np.uint32, 0x7F80_0000),
    torch.float16: (np.uint16, 0x7C00),
    torch.bfloat16: (np.uint16, 0x7F80),
    torch.float8_e4m3fn: (np.uint8, 0x7F),
}
"""A dtype's bits as an integer type, and infinity's: NaNs are the bit patterns above it, sign aside. FP8 (E4M3) has
no infinity, and one NaN."""


def convert(tensor: StoredTensor, transform: Transform, dtype: torch.dtype) -> Iterator[Tensor]:
    """The tensor's values in order as flat pieces of `dtype`.

    Raises CheckpointError that names the tensor on a NaN, an infinity, or a value that overflows `dtype`.
    """
    for piece in read_pieces(tensor, PIECE_BYTES):
        stored = torch.frombuffer(piece, dtype=getattr(torch, tensor.dtype))
        if not _is_finite(stored):
            what = "NaN" if torch.isnan(stored.float()).any() else "an infinity"
            raise CheckpointError(
                f"{tensor.name} holds {what}", hint="the checkpoint is damaged; download it again"
            )
        if transform in (Transform.SCALE, Transform.LARGEST) and not (stored > 0).all():
            raise CheckpointError(
                f"{tensor.name} is {stored.min().item():g}; a scale is above 0",
                hint="quantise the model again: nothing was calibrated there",
            )
        wanted = -torch.exp(stored.float()) if transform is Transform.NEG_EXP else stored
        converted = wanted.to(dtype)
        if converted is not stored and not _is_finite(converted):
            name = PRECISION_OF_DTYPE[str(dtype).removeprefix("torch.")].upper()
            raise CheckpointError(
                f"{tensor.name} holds {stored.abs().max().item():g}, too large for {name}",
                hint="use --precision bf16 or fp32",
            )
        yield converted


def _is_finite(values: Tensor) -> bool:
    """Whether all are finite: one pass over the bits in NumPy, twenty times as fast as torch.isfinite on two cores."""
    integer, infinity = INFINITY_BITS[values.dtype]
    bits = values.view(torch.uint8).numpy().view(integer)
    return bool((bits & integer(np.iinfo(integer).max // 2)).max(initial=0) < infinity)


def values(source: WeightSource, shape: tuple[int, ...], dtype: torch.dtype) -> Iterator[Tensor]:
    """The parameter's values in order as flat pieces of `dtype`: its tensors', or the constant that stands for none."""
    constants = {Transform.ZEROS: 0.0, Transform.ONES: 1.0}
    if source.transform in constants:
        yield torch.full((math.prod(shape),), constants[source.transform], dtype=dtype)
    pieces = (piece for tensor in source.tensors for piece in convert(tensor, source.transform, dtype))
    if source.transform is Transform.LARGEST:
        yield torch.stack([piece.max() for piece in pieces]).max().reshape(1)
    else:
        yield from pieces


def write(
    file: BinaryIO,
    source: WeightSource,
    shape: tuple[int, ...],
    dtype: torch.dtype,
    advance: Callable[[int], None],
) -> tuple[int, int]:
    """Append a parameter's bytes to the file; gives offset and length. `advance` hears of bytes written."""
    file.seek(-(-file.tell() // ALIGNMENT) * ALIGNMENT)
    offset = file.tell()
    for piece in values(source, shape, dtype):
        data = piece.view(torch.uint8).numpy().data
        file.write(data)
        advance(len(data))
    length = file.tell() - offset
    assert length == math.prod(shape) * dtype.itemsize, source.parameter
    return offset, length


def read(source: WeightSource, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """The parameter as one tensor, for the PyTorch reference."""
    whole = torch.empty(math.prod(shape), dtype=dtype)
    position = 0
    for piece in values(source, shape, dtype):
        whole[position : position + len(piece)] = piece
        position += len(piece)
    return whole.reshape(shape)


def data_path(graph: Path) -> Path:
    """Where a graph's external data lies: beside it, so that every ONNX reader accepts it."""
    return graph.with_name(graph.name + ".data")
