"""A checkpoint's values on their way into a dtype: exactly as PyTorch converts them, and none that it would lose."""

from __future__ import annotations

import re
from itertools import product
from pathlib import Path

import pytest
import torch

from nemotrt.exporter.checkpoint import weights
from nemotrt.exporter.checkpoint.safetensors_reader import StoredTensor
from nemotrt.exporter.errors import CheckpointError
from nemotrt.model.checkpoint import Transform

HALVES = (torch.float16, torch.bfloat16)
WIDE = (torch.float32, torch.float64)


def every_finite(dtype: torch.dtype) -> torch.Tensor:
    """Each value that a dtype of 16 bits has."""
    values = torch.arange(-(1 << 15), 1 << 15, dtype=torch.int32).to(torch.int16).view(dtype)
    return values[values.isfinite()]


def convert(values: torch.Tensor, dtype: torch.dtype, room: torch.Tensor | None = None) -> torch.Tensor:
    data = bytearray(values.view(torch.uint8).numpy().tobytes())
    name = str(values.dtype).removeprefix("torch.")
    tensor = StoredTensor("t", name, tuple(values.shape), Path(), 0, len(data))
    return weights.converted(tensor, data, Transform.COPY, dtype, room)


@pytest.mark.parametrize(("stored", "dtype"), [*product(HALVES, (*HALVES, torch.float32))])
def test_every_value_of_16_bits_converts_as_in_pytorch(stored: torch.dtype, dtype: torch.dtype) -> None:
    values = every_finite(stored)
    expected = values.to(dtype)
    fits = expected.isfinite()
    room = torch.empty(1 << 20, dtype=torch.uint8)
    for found in (convert(values[fits], dtype), convert(values[fits], dtype, room)):
        assert torch.equal(found.view(torch.uint8), expected[fits].view(torch.uint8))
    for value in values[~fits][:: max(1, int((~fits).sum()) // 50)]:
        with pytest.raises(CheckpointError, match=re.escape(f"t holds {abs(value.item()):g}, too large")):
            convert(value.reshape(1), dtype)


@pytest.mark.parametrize(("stored", "dtype"), [*product(WIDE, HALVES), (torch.float64, torch.float32)])
@pytest.mark.parametrize("sign", [1, -1])
def test_the_least_value_that_overflows_is_refused(
    stored: torch.dtype, dtype: torch.dtype, sign: int
) -> None:
    integer = torch.int32 if stored is torch.float32 else torch.int64
    limit = weights.first_overflow(stored, dtype)
    most, least = (sign * torch.tensor([bits], dtype=integer).view(stored) for bits in (limit - 1, limit))
    assert most.to(dtype).isfinite()
    assert not least.to(dtype).isfinite()
    assert torch.equal(convert(torch.cat([most] * 9), dtype), torch.cat([most] * 9).to(dtype))
    with pytest.raises(CheckpointError, match="too large for"):
        convert(torch.cat([most, least, most]), dtype)


NAN, INFINITY = float("nan"), float("-inf")


@pytest.mark.parametrize(
    ("dtype", "value", "says"),
    [
        *((dtype, NAN, "NaN") for dtype in (*HALVES, *WIDE, torch.float8_e4m3fn)),
        *((dtype, INFINITY, "an infinity") for dtype in (*HALVES, *WIDE)),  # FP8 has none
    ],
)
def test_what_is_not_finite_is_named(dtype: torch.dtype, value: float, says: str) -> None:
    with pytest.raises(CheckpointError, match=f"t holds {says}"):
        convert(torch.tensor([0.5, value, 0.25]).to(dtype), dtype)
