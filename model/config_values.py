"""Reads the JSON values of a config.json's fields; a value of another kind or size is an error that names the field."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

from nemotrt.plugins.contract import DType

DTYPES = (DType.FLOAT32, DType.FLOAT16, DType.BFLOAT16)
"""The dtypes that `dtype` in a config.json may name."""

LARGEST_SIZE = (1 << 31) - 1
"""The largest size or token id: indices are INT32."""

LARGEST = 3.4028234663852886e38
"""The largest finite FP32. A time step limit at or above it means no limit; ONNX attributes must be finite."""


class ConfigError(ValueError):
    """A config.json is contradictory or incomplete, or asks for something the model does not compute.

    `hint` says what to do, where that is known.
    """

    def __init__(self, message: str, hint: str = "") -> None:
        super().__init__(message)
        self.hint = hint


def _require(is_valid: bool, name: str, value: Any, expected: str) -> None:
    if not is_valid:
        written = json.dumps(value)
        shown = written if len(written) <= 60 else f"{written[:60]}…"
        raise ConfigError(f"{name} is {shown}; it must be {expected}")


def size(name: str, value: Any) -> int:
    """The value as a size; raises ConfigError if it is not one."""
    is_size = type(value) is int and 0 <= value <= LARGEST_SIZE
    _require(is_size, name, value, f"a whole number from 0 to {LARGEST_SIZE}")
    return int(value)


def _flag(name: str, value: Any) -> bool:
    _require(type(value) is bool, name, value, "true or false")
    return bool(value)


def _number(name: str, value: Any) -> float:
    # NaN is not less than anything, and an integer can be too large for a float.
    _require(type(value) in (int, float) and abs(value) <= LARGEST, name, value, "a finite FP32 number")
    return float(value)


def _dtype(name: str, value: Any) -> DType:
    dtype = value.removeprefix("torch.") if isinstance(value, str) else value
    _require(dtype in DTYPES, name, value, f"one of {', '.join(DTYPES)}")
    return DType(dtype)


def _limits(name: str, value: Any) -> tuple[float, float]:
    _require(isinstance(value, list | tuple) and len(value) == 2, name, value, "two numbers")
    # A limit at or above the largest number is none.
    bounds = (LARGEST if type(bound) in (int, float) and bound > LARGEST else bound for bound in value)
    low, high = (_number(name, bound) for bound in bounds)
    _require(0 <= low <= high, name, value, "two increasing numbers, 0 or more")
    return low, high


def _ids(name: str, value: Any) -> tuple[int, ...]:
    return tuple(size(name, token) for token in (value if isinstance(value, list) else [value]))


def _object(name: str, value: Any) -> dict[str, Any]:
    _require(isinstance(value, dict), name, value, "a JSON object")
    return dict(value)


CONVERTERS: dict[Any, Callable[[str, Any], Any]] = {
    bool: _flag,
    int: size,
    int | None: size,
    float: _number,
    DType: _dtype,
    tuple[float, float]: _limits,
    tuple[int, ...]: _ids,
    dict[str, Any] | None: _object,
}
"""How to read the JSON value of a field with a given type hint."""
