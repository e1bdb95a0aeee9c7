"""A checkpoint's values as a parameter wants them, a piece at a time, every one judged on its way."""

from __future__ import annotations

import math
from bisect import bisect_left
from collections.abc import Iterator, Mapping
from functools import cache
from typing import Any

import numpy as np
import torch
from torch import Tensor

from nemotrt.exporter.checkpoint.loaded_model import WeightSource
from nemotrt.exporter.checkpoint.safetensors_reader import StoredTensor, read_pieces
from nemotrt.exporter.errors import CheckpointError
from nemotrt.model.checkpoint import Transform
from nemotrt.model.config import ModelConfig
from nemotrt.model.hybrid import NemotronH
from nemotrt.plugins.contract import DType

Wanted = tuple[WeightSource, tuple[int, ...], torch.dtype]
"""Where a parameter's values come from, and in what shape and dtype the graph has it."""

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

WIDENED = 1 << 17
"""Values that are in FP32 at a time on their way between two narrow dtypes: they stay in a core's own cache."""


def wanted(config: ModelConfig, sources: Mapping[str, WeightSource], dtype: torch.dtype) -> list[Wanted]:
    """Each parameter of a model whose linears compute in `dtype`, as far as there are sources; tied ones are one."""
    network = NemotronH(config, dtype=dtype, device="meta")
    values = network.state_dict(keep_vars=True)
    first: dict[int, str] = {}
    for name, value in values.items():
        first.setdefault(id(value), name)
    return [
        (sources[name], tuple(values[name].shape), values[name].dtype)
        for name in first.values()
        if name in sources
    ]


def convert(tensor: StoredTensor, transform: Transform, dtype: torch.dtype) -> Iterator[Tensor]:
    """The tensor's values in order as flat pieces of `dtype`; raises as `converted`."""
    for piece in read_pieces(tensor, PIECE_BYTES):
        yield converted(tensor, piece, transform, dtype)


def converted(
    tensor: StoredTensor,
    piece: bytearray | memoryview,
    transform: Transform,
    dtype: torch.dtype,
    room: Tensor | None = None,
) -> Tensor:
    """A piece of the tensor's bytes as flat values of `dtype`; in the piece's own memory where nothing changes.

    Else in `room`, flat bytes of which there are enough, or in new memory. Raises CheckpointError that names the
    tensor on a NaN, an infinity, a scale that is none, or a value that overflows `dtype`.
    """
    stored = torch.frombuffer(piece, dtype=getattr(torch, tensor.dtype))
    largest = _largest_bits(stored)
    if largest >= INFINITY_BITS[stored.dtype][1]:
        what = "NaN" if torch.isnan(stored.float()).any() else "an infinity"
        raise CheckpointError(
            f"{tensor.name} holds {what}", hint="the checkpoint is damaged; download it again"
        )
    if transform in (Transform.SCALE, Transform.LARGEST) and not (stored > 0).all():
        raise CheckpointError(
            f"{tensor.name} is {stored.min().item():g}; a scale is above 0",
            hint="quantize the model again: nothing was calibrated there",
        )
    wanted = stored
    if transform is Transform.NEG_EXP:
        wanted = -torch.exp(stored.float())
        largest = _largest_bits(wanted)
    if largest >= first_overflow(wanted.dtype, dtype):
        name = DType.from_torch(dtype).label
        raise CheckpointError(
            f"{tensor.name} holds {stored.abs().max().item():g}, too large for {name}",
            hint="use --precision bf16 or fp32",
        )
    return _cast(wanted, dtype, room)


def _largest_bits(values: Tensor) -> int:
    """The bits of the value that is farthest from 0, sign aside: two passes and no copy.

    They grow with the magnitude, through infinity to NaN; seen as signed, negative values are below all.
    """
    integer, _ = INFINITY_BITS[values.dtype]
    bits = values.view(torch.uint8).numpy().view(integer)
    sign = 1 << (bits.itemsize * 8 - 1)
    signed = bits.view(f"i{bits.itemsize}")
    largest: int = max(int(signed.max(initial=0)), int(bits.max(initial=0)) - sign)
    return largest


@cache
def first_overflow(stored: torch.dtype, dtype: torch.dtype) -> int:
    """The bits of the least positive value of `stored` that is not finite in `dtype`; infinity's where none is."""
    integer, infinity = INFINITY_BITS[stored]

    def overflows(bits: int) -> bool:
        value = torch.from_numpy(np.array([bits], integer).view(np.uint8)).view(stored)
        return not math.isfinite(value.to(dtype).item())

    return bisect_left(range(infinity), True, key=overflows)


def _cast(values: Tensor, dtype: torch.dtype, room: Tensor | None) -> Tensor:
    if values.dtype is dtype:
        return values
    length = len(values) * dtype.itemsize
    found = (torch.empty(length, dtype=torch.uint8) if room is None else room[:length]).view(dtype)
    if {values.dtype, dtype} != {torch.bfloat16, torch.float16}:
        return found.copy_(values)
    # PyTorch converts these two into each other one by one; through FP32, which holds both, by vectors.
    for begin in range(0, len(values), WIDENED):
        part = slice(begin, begin + WIDENED)
        found[part].copy_(values[part].float())
    return found


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
