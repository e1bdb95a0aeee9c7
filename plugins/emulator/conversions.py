"""`cvt`: between integers, FP64, FP32, FP16, BF16 and pairs of E4M3."""

from __future__ import annotations

from typing import Any

import ml_dtypes
import numpy as np

from nemotrt.plugins.emulator.errors import NotEmulated
from nemotrt.plugins.emulator.machine import Machine
from nemotrt.plugins.emulator.ptx import Instruction
from nemotrt.plugins.emulator.registers import Array, Mask, dtype_of

E4M3 = np.dtype(ml_dtypes.float8_e4m3fn)
E4M3_MAX = 448.0
PAIRS = ("f16x2", "bf16x2", "e4m3x2")
ROUNDINGS = ("rn", "rz", "rni", "rzi")
KNOWN = {*ROUNDINGS, "satfinite", "ftz"}


def convert(machine: Machine, i: Instruction, mask: Mask | None) -> None:
    """Convert one value, or two to or from a packed pair."""
    *modifiers, target, source = i.parts[1:]
    if unknown := set(modifiers) - KNOWN:
        raise NotEmulated(f"cvt with .{', .'.join(sorted(unknown))}")
    if target in PAIRS or source in PAIRS:
        _convert_pair(machine, i, mask, target, source)
        return
    values = machine.read(i.operands[1], source)
    dtype = dtype_of(target)
    rounding = next((name for name in modifiers if name in ROUNDINGS), "rn")
    if values.dtype.kind in "iu":
        result = values.astype(dtype)
    elif dtype.kind in "iu":
        result = _to_integer(values, dtype, rounding)
    else:
        result = rounded(values, dtype, rounding)
    machine.write(i.operands[0], result, mask)


def _to_integer(values: Array, dtype: np.dtype[Any], rounding: str) -> Array:
    """Rounded and saturated; NaN is 0."""
    if rounding not in ("rni", "rzi"):
        raise NotEmulated(f"a conversion to an integer with .{rounding}")
    limits = np.iinfo(dtype)
    whole = (np.rint if rounding == "rni" else np.trunc)(values.astype(np.float64))
    whole = np.where(np.isnan(whole), 0, whole)
    if limits.bits == 64:
        raise NotEmulated("a conversion of a float to 64 bits")
    return np.clip(whole, limits.min, limits.max).astype(dtype)


def rounded(values: Array, dtype: np.dtype[Any], rounding: str = "rn") -> Array:
    """A float in another format: rounded to nearest even, or toward zero."""
    nearest = values.astype(dtype)
    if rounding == "rn" or dtype.itemsize >= values.dtype.itemsize:
        return nearest
    if rounding != "rz":
        raise NotEmulated(f"a conversion with .{rounding}")
    bits = nearest.view(f"u{dtype.itemsize}")
    is_larger = np.abs(nearest.astype(values.dtype)) > np.abs(values)
    return np.where(is_larger, bits - bits.dtype.type(1), bits).view(dtype)


def to_e4m3(values: Array) -> Array:
    """The bits of FP32 values in E4M3: rounded to nearest even and saturated; NaN is 0x7F."""
    clipped = np.clip(values.astype(np.float32), -E4M3_MAX, E4M3_MAX)
    bits = clipped.astype(E4M3).view(np.uint8)
    return np.where(np.isnan(values), np.uint8(0x7F), bits)


def halves(packed: Array, kind: str) -> tuple[Array, Array]:
    """The lower and the upper value of a packed pair (f16x2, bf16x2 or e4m3x2), in FP32."""
    width = 8 if kind == "e4m3x2" else 16
    dtype = E4M3 if kind == "e4m3x2" else dtype_of(kind.removesuffix("x2"))
    parts = (packed, packed >> packed.dtype.type(width))
    low, high = (part.astype(f"u{width // 8}").view(dtype).astype(np.float32) for part in parts)
    return low, high


def _convert_pair(machine: Machine, i: Instruction, mask: Mask | None, target: str, source: str) -> None:
    if source in PAIRS:
        low, high = halves(machine.read(i.operands[1], "b16" if source == "e4m3x2" else "b32"), source)
    else:
        high, low = (machine.read(operand, source) for operand in i.operands[1:])
    if "rn" not in i.parts:
        raise NotEmulated(i.text)
    if target == "e4m3x2":
        result = to_e4m3(high).astype(np.uint16) << 8 | to_e4m3(low)
    elif target in PAIRS:
        dtype = dtype_of(target.removesuffix("x2"))
        low, high = (value.astype(dtype).view(np.uint16).astype(np.uint32) for value in (low, high))
        result = high << 16 | low
    else:
        raise NotEmulated(i.text)
    machine.write(i.operands[0], result, mask)


INSTRUCTIONS = {"cvt": convert}
