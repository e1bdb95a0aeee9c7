"""The registers of all threads: one array with a lane per thread for each register."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import ml_dtypes
import numpy as np
from numpy.typing import NDArray

from nemotrt.plugins.emulator.errors import NotEmulated
from nemotrt.plugins.emulator.ptx import Immediate, Operand, Program, Register, Symbol, Vector

SINK = Symbol("_")
"""The destination of a value that is not needed."""

Array = NDArray[Any]
Mask = NDArray[np.bool_]

TYPES: dict[str, np.dtype[Any]] = {
    "pred": np.dtype(bool),
    "f16": np.dtype(np.float16),
    "bf16": np.dtype(ml_dtypes.bfloat16),
    "f32": np.dtype(np.float32),
    "f64": np.dtype(np.float64),
    **{f"{kind}{8 * size}": np.dtype(f"u{size}") for kind in "bu" for size in (1, 2, 4, 8)},
    **{f"s{8 * size}": np.dtype(f"i{size}") for size in (1, 2, 4, 8)},
}
"""The NumPy dtype of each PTX type."""


def dtype_of(kind: str) -> np.dtype[Any]:
    """The dtype of a PTX type; raises NotEmulated if there is none."""
    if kind not in TYPES:
        raise NotEmulated(f"the type .{kind}")
    return TYPES[kind]


def storage_of(kind: str) -> np.dtype[Any]:
    """The dtype that a register of this type is stored in: bool, or unsigned."""
    dtype = dtype_of(kind)
    return dtype if dtype.kind == "b" else np.dtype(f"u{dtype.itemsize}")


class Registers:
    """Reads and writes operands. A register that was never written reads as all ones, which is NaN as a float."""

    def __init__(self, program: Program, special: Mapping[str, Array], num_lanes: int) -> None:
        self._storage = {name: storage_of(kind) for name, kind in program.registers.items()}
        self._values: dict[str, Array] = dict(special)
        self._shared = program.shared
        self._num_lanes = num_lanes

    def read(self, operand: Operand, kind: str) -> Array:
        """The operand as a PTX type: an array of all lanes, or of one element for a constant."""
        dtype = dtype_of(kind)
        if isinstance(operand, Register):
            return self._as(self._lanes(operand.name), dtype)
        if isinstance(operand, Immediate):
            if dtype.kind == "b":
                return np.array([bool(operand.bits)])
            bits = operand.bits & ((1 << (8 * dtype.itemsize)) - 1)
            return np.array([bits], dtype=f"u{dtype.itemsize}").view(dtype)
        if isinstance(operand, Symbol) and operand.name == self._shared:
            return np.zeros(1, dtype)  # shared memory starts at 0
        raise NotEmulated(f"the operand {operand}")

    def lanes(self, operand: Operand, kind: str) -> Array:
        """The operand as a PTX type, always an array of all lanes."""
        return np.broadcast_to(self.read(operand, kind), (self._num_lanes,))

    def _lanes(self, name: str) -> Array:
        values = self._values.get(name)
        if values is None:
            if name not in self._storage:
                raise NotEmulated(f"the register {name}")
            storage = self._storage[name]
            ones = True if storage.kind == "b" else np.iinfo(storage).max
            values = self._values[name] = np.full(self._num_lanes, ones, storage)
        return values

    @staticmethod
    def _as(values: Array, dtype: np.dtype[Any]) -> Array:
        if values.dtype == dtype:
            return values
        if values.dtype.itemsize != dtype.itemsize or values.dtype.kind == "b" or dtype.kind == "b":
            if dtype.kind not in "iu" or values.dtype.itemsize < dtype.itemsize:
                raise NotEmulated(f"a register of {values.dtype} that is read as {dtype}")
            values = values.astype(f"u{dtype.itemsize}")
        return values.view(dtype)

    def write(self, operand: Operand, values: Array, mask: Mask | None) -> None:
        """Set a register in the lanes of the mask; a narrower integer is extended by its sign."""
        if operand == SINK:
            return
        assert isinstance(operand, Register)
        storage = self._storage[operand.name]
        if values.dtype != storage:
            if values.dtype.itemsize != storage.itemsize:
                assert values.dtype.kind in "iu", (operand, values.dtype)
                values = values.astype(f"{values.dtype.kind}{storage.itemsize}")
            values = np.ascontiguousarray(values).view(storage)
        if mask is None:
            self._values[operand.name] = np.broadcast_to(values, (self._num_lanes,))
        else:
            self._values[operand.name] = np.where(mask, values, self._lanes(operand.name))


def elements(operand: Operand) -> tuple[Operand, ...]:
    """The elements of a vector, or the operand itself."""
    return operand.elements if isinstance(operand, Vector) else (operand,)
