"""Convert a checkpoint's values to a parameter's shape and dtype, piece by piece, and check every value."""

import math
from bisect import bisect_left
from collections import defaultdict
from collections.abc import Iterator
from functools import cache

import numpy as np
import torch
from torch import Tensor

from nemotrt.exporter import environment
from nemotrt.exporter.checkpoint import safetensors_reader
from nemotrt.exporter.checkpoint.loaded_model import WeightSource
from nemotrt.exporter.checkpoint.safetensors_reader import StoredTensor, read_pieces
from nemotrt.exporter.errors import CheckpointError
from nemotrt.model.checkpoint import Transform
from nemotrt.plugins.contract import DType

environment.disable_amx()  # here, because PyTorch computes nothing before it has weights

INFINITY_BITS = {
    DType.FLOAT64: 0x7FF0_0000_0000_0000,
    DType.FLOAT32: 0x7F80_0000,
    DType.FLOAT16: 0x7C00,
    DType.BFLOAT16: 0x7F80,
    DType.FLOAT8_E4M3: 0x7F,
}
"""The bits of infinity; without the sign, a NaN has the same bits or larger ones. E4M3 has no infinity and one NaN."""

OVERFLOW_HINTS = defaultdict(
    lambda: "no precision can represent it: the checkpoint is damaged, or its training diverged",
    {DType.FLOAT16: "use --precision bf16 or fp32", DType.BFLOAT16: "use --precision fp32"},
)
"""The dtype that a value overflows → what to do."""

BLOCK_VALUES = 1 << 17
"""Values that are converted at a time through FP32: they fit a core's cache."""


def convert(tensor: StoredTensor, transform: Transform, dtype: DType) -> Iterator[Tensor]:
    """The tensor's values in order, as flat pieces of `dtype`; raises as `convert_piece` does."""
    for piece in read_pieces(tensor):
        yield convert_piece(tensor, piece, transform, dtype)


def convert_piece(
    tensor: StoredTensor,
    piece: bytearray | memoryview,
    transform: Transform,
    dtype: DType,
    buffer: Tensor | None = None,
) -> Tensor:
    """Some of the tensor's bytes as flat values of `dtype`, which share the piece's memory if nothing changes.

    Otherwise they are in `buffer` (bytes, large enough), or in new memory. Raises CheckpointError, naming the tensor,
    on a NaN, an infinity, a scale that is not positive, and a value that overflows `dtype`.
    """
    stored = torch.frombuffer(piece, dtype=tensor.dtype.torch)
    max_bits = _max_bits(stored)
    if max_bits >= INFINITY_BITS[tensor.dtype]:
        what = "NaN" if torch.isnan(stored.float()).any() else "an infinity"
        raise CheckpointError(
            f"{tensor.name} holds {what}", hint="the checkpoint is damaged; download it again"
        )
    if transform in (Transform.SCALE, Transform.LARGEST) and not (stored > 0).all():
        raise CheckpointError(
            f"{tensor.name} is {stored.min().item():g}, but a scale must be above 0",
            hint="the module was not calibrated; quantize the model again",
        )
    values, values_dtype, whose = stored, tensor.dtype, ""
    if transform is Transform.NEG_EXP:
        values, values_dtype = -torch.exp(stored.float()), DType.FLOAT32
        max_bits, whose = _max_bits(values), "whose exponential is "
    if max_bits >= first_overflow(values_dtype, dtype):
        raise CheckpointError(
            f"{tensor.name} holds {stored.abs().max().item():g}, {whose}too large for {dtype.label}",
            hint=OVERFLOW_HINTS[dtype],
        )
    return _cast(values, dtype.torch, buffer)


def _max_bits(values: Tensor) -> int:
    """The bits of the value with the largest magnitude, without its sign, in two passes and no copy.

    The bits grow with the magnitude, through infinity to NaN. Seen as signed integers, negative values come last.
    """
    size = values.dtype.itemsize
    bits = values.view(torch.uint8).numpy()
    max_positive = bits.view(f"i{size}").max(initial=0)
    max_negative = int(bits.view(f"u{size}").max(initial=0)) - (1 << (size * 8 - 1))
    return max(int(max_positive), max_negative)


@cache
def first_overflow(stored: DType, dtype: DType) -> int:
    """The bits of the smallest positive value of `stored` that is not finite in `dtype`: at most infinity's."""

    def overflows(bits: int) -> bool:
        value = torch.from_numpy(np.array([bits], f"u{stored.itemsize}").view(np.uint8)).view(stored.torch)
        return not math.isfinite(value.to(dtype.torch).item())

    return bisect_left(range(INFINITY_BITS[stored]), True, key=overflows)


def _cast(values: Tensor, dtype: torch.dtype, buffer: Tensor | None) -> Tensor:
    if values.dtype is dtype:
        return values
    size = len(values) * dtype.itemsize
    result = (torch.empty(size, dtype=torch.uint8) if buffer is None else buffer[:size]).view(dtype)
    if {values.dtype, dtype} != {torch.bfloat16, torch.float16}:
        return result.copy_(values)
    # PyTorch converts between these two without SIMD; through FP32, which represents both exactly, it uses SIMD.
    for begin in range(0, len(values), BLOCK_VALUES):
        block = slice(begin, begin + BLOCK_VALUES)
        result[block].copy_(values[block].float())
    return result


def values(source: WeightSource, shape: tuple[int, ...], dtype: DType) -> Iterator[Tensor]:
    """The parameter's values in order, as flat pieces of `dtype`."""
    constants = {Transform.ZEROS: 0.0, Transform.ONES: 1.0}
    if source.transform in constants:
        yield torch.full((math.prod(shape),), constants[source.transform], dtype=dtype.torch)
    pieces = (piece for tensor in source.tensors for piece in convert(tensor, source.transform, dtype))
    if source.transform is Transform.LARGEST:
        yield torch.stack([piece.max() for piece in pieces]).max().reshape(1)
    elif source.transform is Transform.SCALE:
        repeats = math.prod(shape) // sum(math.prod(tensor.shape) for tensor in source.tensors)
        yield from (piece.repeat_interleave(repeats) for piece in pieces)
    else:
        yield from pieces


def read(source: WeightSource, shape: tuple[int, ...], dtype: DType) -> Tensor:
    """The parameter as one tensor."""
    parameter = torch.empty(math.prod(shape), dtype=dtype.torch)
    position = 0
    for piece in values(source, shape, dtype):
        parameter[position : position + len(piece)] = piece
        position += len(piece)
    return parameter.reshape(shape)


def read_or_map(source: WeightSource, shape: tuple[int, ...], dtype: DType) -> Tensor:
    """Like `read`, but memory-mapped if the file stores the parameter in this form; do not write to the tensor."""
    if not source.is_stored_as(dtype):
        return read(source, shape, dtype)
    (tensor,) = source.tensors
    stored = np.memmap(tensor.path, np.uint8, "c", tensor.offset, tensor.length)
    piece_bytes = safetensors_reader.PIECE_BYTES
    for begin in range(0, tensor.length, piece_bytes):
        convert_piece(tensor, stored[begin : begin + piece_bytes].data, source.transform, dtype)
    return torch.from_numpy(stored).view(dtype.torch).reshape(shape)
