"""Streams weights from a checkpoint to a graph's external data, a piece at a time, judging every value on its way."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import BinaryIO

import torch
from torch import Tensor

from nemotrt.exporter.artifacts import WeightSource
from nemotrt.exporter.errors import CheckpointError
from nemotrt.exporter.tensor_files import StoredTensor, read_pieces
from nemotrt.model.checkpoint import Transform

PIECE_BYTES = 16 << 20
"""What is in memory of a checkpoint at any time, times a small factor for the cast."""

ALIGNMENT = 4096
"""Tensors start on a page, so that a runtime can map each of them."""


def convert(tensor: StoredTensor, transform: Transform, dtype: torch.dtype) -> Iterator[Tensor]:
    """The tensor's values in order as flat pieces of `dtype`.

    Raises CheckpointError that names the tensor on a NaN, an infinity, or a value that overflows `dtype`.
    """
    stored = getattr(torch, tensor.dtype)
    for piece in read_pieces(tensor, PIECE_BYTES):
        values = torch.frombuffer(piece, dtype=stored)
        _check_finite(tensor, values, stored)
        if transform is Transform.NEG_EXP:
            values = -torch.exp(values.to(torch.float32))
        converted = values.to(dtype)
        if _range(dtype) < _range(values.dtype):
            _check_overflow(tensor, values, converted)
        elif transform is Transform.NEG_EXP:
            _check_finite(tensor, converted, dtype)
        yield converted


def _check_finite(tensor: StoredTensor, values: Tensor, dtype: torch.dtype) -> None:
    # One pass that needs no mask: the sum of absolute maxima is NaN or infinite as soon as one value is.
    extreme = values.abs().amax() if values.numel() else torch.zeros(())
    if not torch.isfinite(extreme):
        what = "NaN" if torch.isnan(extreme) else "an infinity"
        raise CheckpointError(
            f"{tensor.name} holds {what}", hint="the checkpoint is damaged; download it again"
        )


def _check_overflow(tensor: StoredTensor, values: Tensor, converted: Tensor) -> None:
    if not torch.isfinite(converted.abs().amax()):
        largest = values.abs().amax().item()
        limit = torch.finfo(converted.dtype).max
        name = {torch.float16: "FP16", torch.bfloat16: "BF16"}.get(converted.dtype, str(converted.dtype))
        raise CheckpointError(
            f"{tensor.name} holds {largest:g}, beyond {name}'s {limit:g}", hint="use --precision bf16 or fp32"
        )


def _range(dtype: torch.dtype) -> float:
    return float(torch.finfo(dtype).max)


def values(source: WeightSource, shape: tuple[int, ...], dtype: torch.dtype) -> Iterator[Tensor]:
    """The parameter's values in order as flat pieces of `dtype`: its tensors', or the constant that stands for none."""
    constants = {Transform.ZEROS: 0.0, Transform.ONES: 1.0}
    if source.transform in constants:
        yield torch.full((math.prod(shape),), constants[source.transform], dtype=dtype)
    for tensor in source.tensors:
        yield from convert(tensor, source.transform, dtype)


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
