"""Values convert exactly as in PyTorch, and values that would overflow are refused."""

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
from nemotrt.plugins.contract import DType

HALVES = (torch.float16, torch.bfloat16)
WIDE = (torch.float32, torch.float64)


def every_finite(dtype: torch.dtype) -> torch.Tensor:
    """All finite values of a 16-bit dtype."""
    values = torch.arange(-(1 << 15), 1 << 15, dtype=torch.int32).to(torch.int16).view(dtype)
    return values[values.isfinite()]


def convert(values: torch.Tensor, dtype: torch.dtype, buffer: torch.Tensor | None = None) -> torch.Tensor:
    data = bytearray(values.view(torch.uint8).numpy().tobytes())
    stored = DType.from_torch(values.dtype)
    tensor = StoredTensor("t", stored, tuple(values.shape), Path(), 0, len(data))
    return weights.convert_piece(tensor, data, Transform.COPY, DType.from_torch(dtype), buffer)


@pytest.mark.parametrize(("stored", "dtype"), [*product(HALVES, (*HALVES, torch.float32))])
def test_every_value_of_16_bits_converts_as_in_pytorch(stored: torch.dtype, dtype: torch.dtype) -> None:
    values = every_finite(stored)
    expected = values.to(dtype)
    fits = expected.isfinite()
    buffer = torch.empty(1 << 20, dtype=torch.uint8)
    for converted in (convert(values[fits], dtype), convert(values[fits], dtype, buffer)):
        assert torch.equal(converted.view(torch.uint8), expected[fits].view(torch.uint8))
    for value in values[~fits][:: max(1, int((~fits).sum()) // 50)]:
        with pytest.raises(CheckpointError, match=re.escape(f"t holds {abs(value.item()):g}, too large")):
            convert(value.reshape(1), dtype)


@pytest.mark.parametrize(("stored", "dtype"), [*product(WIDE, HALVES), (torch.float64, torch.float32)])
@pytest.mark.parametrize("sign", [1, -1])
def test_the_smallest_value_that_overflows_is_refused(
    stored: torch.dtype, dtype: torch.dtype, sign: int
) -> None:
    integer = torch.int32 if stored is torch.float32 else torch.int64
    limit = weights.first_overflow(DType.from_torch(stored), DType.from_torch(dtype))
    fits, overflows = (sign * torch.tensor([bits], dtype=integer).view(stored) for bits in (limit - 1, limit))
    assert fits.to(dtype).isfinite()
    assert not overflows.to(dtype).isfinite()
    assert torch.equal(convert(torch.cat([fits] * 9), dtype), torch.cat([fits] * 9).to(dtype))
    with pytest.raises(CheckpointError, match="too large for"):
        convert(torch.cat([fits, overflows, fits]), dtype)


@pytest.mark.parametrize(
    ("dtype", "hint"),
    [
        (torch.float16, "use --precision bf16 or fp32"),
        (torch.bfloat16, "use --precision fp32"),
        (torch.float32, "no precision can represent it"),
    ],
)
def test_an_overflow_is_advised_for_its_precision(dtype: torch.dtype, hint: str) -> None:
    with pytest.raises(CheckpointError) as caught:
        convert(torch.tensor([1e300], dtype=torch.float64), dtype)
    assert caught.value.hint.startswith(hint)


NAN, INFINITY = float("nan"), float("-inf")


@pytest.mark.parametrize(
    ("dtype", "value", "message"),
    [
        *((dtype, NAN, "NaN") for dtype in (*HALVES, *WIDE, torch.float8_e4m3fn)),
        *((dtype, INFINITY, "an infinity") for dtype in (*HALVES, *WIDE)),  # FP8 has none
    ],
)
def test_a_value_that_is_not_finite_is_named(dtype: torch.dtype, value: float, message: str) -> None:
    with pytest.raises(CheckpointError, match=f"t holds {message}"):
        convert(torch.tensor([0.5, value, 0.25]).to(dtype), dtype)
