"""A checkpoint's values as a parameter wants them, a piece at a time, every one judged on its way."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

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

INFINITY_BITS: dict[torch.dtype, tuple[Any, int]] = {
    torch.float64: (np.uint64, 0x7FF0_0000_0000_0000),
    torch.float32: (np.uint32, 0x7F80_0000),
    torch.float16: (np.uint16, 0x7C00),
    torch.bfloat16: (np.uint16, 0x7F80),
    torch.float8_e4m3fn: (np.uint8, 0x7F),
}
"""A dtype's bits as an integer type, and infinity's: NaNs are the bit patterns above it, sign aside. FP8 (E4M3) has
no infinity, and one NaN."""


UNCHANGED = (Transform.COPY, Transform.RESHAPE)
"""Transforms that keep the values in order."""


def convert(tensor: StoredTensor, transform: Transform, dtype: torch.dtype) -> Iterator[Tensor]:
    """The tensor's values in order as flat pieces of `dtype`; raises as `converted`."""
    for piece in read_pieces(tensor, PIECE_BYTES):
        yield converted(tensor, piece, transform, dtype)


def converted(
    tensor: StoredTensor, piece: bytearray | memoryview, transform: Transform, dtype: torch.dtype
) -> Tensor:
    """A piece of the tensor's bytes as flat values of `dtype`; in the piece's own memory where nothing changes.

    Raises CheckpointError that names the tensor on a NaN, an infinity, a scale that is none, or a value that overflows
    `dtype`.
    """
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
    found = wanted.to(dtype)
    if found is not stored and not _is_finite(found):
        name = PRECISION_OF_DTYPE[str(dtype).removeprefix("torch.")].upper()
        raise CheckpointError(
            f"{tensor.name} holds {stored.abs().max().item():g}, too large for {name}",
            hint="use --precision bf16 or fp32",
        )
    return found


def _is_finite(values: Tensor) -> bool:
    """Whether all are finite: two passes over the bits and no copy, ten times as fast as torch.isfinite.

    Finite values of either sign have bits below that sign's infinity; seen as signed, negative values are below all.
    """
    integer, infinity = INFINITY_BITS[values.dtype]
    bits = values.view(torch.uint8).numpy().view(integer)
    sign = 1 << (bits.itemsize * 8 - 1)
    signed = bits.view(f"i{bits.itemsize}")
    return bool(signed.max(initial=0) < infinity and bits.max(initial=0) < sign + infinity)


def values(source: WeightSource, shape: tuple[int, ...], dtype: torch.dtype) -> Iterator[Tensor]:
    """The parameter's values in order as flat pieces of `dtype`: its tensors', or the constant that stands for none."""
    constants = {Transform.ZEROS: 0.0, Transform.ONES: 1.0}
    if source.transform in constants:
        yield torch.full((math.prod(shape),), constants[source.transform], dtype=dtype)
    pieces = (piece for tensor in source.tensors for piece in convert(tensor, source.transform, dtype))
    if source.transform is Transform.LARGEST:
        yield torch.stack([piece.max() for piece in pieces]).max().reshape(1)
    elif source.transform is Transform.SCALE:
        times = math.prod(shape) // sum(math.prod(tensor.shape) for tensor in source.tensors)
        yield from (piece.repeat_interleave(times) for piece in pieces)
    else:
        yield from pieces


def read(source: WeightSource, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """The parameter as one tensor, for the PyTorch reference."""
    whole = torch.empty(math.prod(shape), dtype=dtype)
    position = 0
    for piece in values(source, shape, dtype):
        whole[position : position + len(piece)] = piece
        position += len(piece)
    return whole.reshape(shape)


def lies_as_wanted(source: WeightSource, dtype: torch.dtype) -> bool:
    """Whether one stored tensor holds the parameter's values in `dtype`, in order."""
    is_one = len(source.tensors) == 1 and source.transform in UNCHANGED
    return is_one and getattr(torch, source.tensors[0].dtype) is dtype


def lying(source: WeightSource, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """As `read`, in the file's own pages where it holds the parameter as it is wanted: not to be written to."""
    if not lies_as_wanted(source, dtype):
        return read(source, shape, dtype)
    (tensor,) = source.tensors
    stored = np.memmap(tensor.path, np.uint8, "c", tensor.offset, tensor.length)
    for begin in range(0, tensor.length, PIECE_BYTES):
        converted(tensor, stored[begin : begin + PIECE_BYTES].data, source.transform, dtype)
    return torch.from_numpy(stored).view(dtype).reshape(shape)
