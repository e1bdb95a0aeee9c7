"""Quantize stored weights to FP8 with scales in FP32, as tensors of a new checkpoint."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator

import torch
from torch import Tensor

from nemotrt.exporter.checkpoint import weights
from nemotrt.exporter.checkpoint.safetensors_reader import StoredTensor
from nemotrt.exporter.checkpoint.safetensors_writer import Entry
from nemotrt.model.checkpoint import Transform
from nemotrt.plugins.contract import DType
from nemotrt.plugins.e4m3 import FP8_MAX, to_e4m3


def expert_tensor(stacked: StoredTensor, expert: int) -> StoredTensor:
    """One expert's weight in a stored tensor that has those of all experts."""
    length = stacked.length // stacked.shape[0]
    return dataclasses.replace(
        stacked,
        name=f"{stacked.name}[{expert}]",
        shape=stacked.shape[1:],
        offset=stacked.offset + expert * length,
        length=length,
    )


def quantized_weight(
    module: str, weight: StoredTensor, input_max: float, *, per_output: bool
) -> Iterator[Entry]:
    """The module's weight in FP8, its scale (or one scale for each output), and the scale of its input.

    Raises CheckpointError on a value that is not finite.
    """

    def pieces() -> Iterator[Tensor]:
        flat = weights.convert(weight, Transform.COPY, weight.dtype)
        return iter([torch.cat(list(flat)).reshape(weight.shape)]) if per_output else flat

    # A magnitude for each row [O, 1], or for each flat piece [1].
    largest = torch.cat([piece.abs().amax(-1, keepdim=True) for piece in pieces()]).float()
    largest = largest if per_output else largest.max()
    scale = torch.where(largest > 0, largest / FP8_MAX, 1.0)

    def data() -> Iterator[bytes]:
        for piece in pieces():
            yield to_e4m3(piece, scale).view(torch.uint8).numpy().tobytes()

    yield Entry(f"{module}.weight", DType.FLOAT8_E4M3, weight.shape, data)
    yield scale_entry(f"{module}.weight_scale", scale.squeeze(-1))
    yield scale_entry(f"{module}.input_scale", torch.tensor(input_max / FP8_MAX))


def scale_entry(name: str, value: Tensor) -> Entry:
    """A scale in FP32."""
    data = value.float().numpy().tobytes()
    return Entry(name, DType.FLOAT32, tuple(value.shape), lambda: iter((data,)))
