"""Arithmetic, logic and moves. Approximations (`ex2.approx`, `div.full`) are computed in higher precision.

`fma` in FP32 is computed in FP64 and rounded to FP32, so that a result very close to a tie may be rounded twice.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from nemotrt.plugins.emulator.errors import NotEmulated
from nemotrt.plugins.emulator.machine import Machine
from nemotrt.plugins.emulator.ptx import Instruction, Vector
from nemotrt.plugins.emulator.registers import Array, Mask, dtype_of

FLOATS = ("f16", "bf16", "f32", "f64")
Compare = Callable[[Array, Array], Array]

COMPARISONS: dict[str, Compare] = {
    "eq": lambda a, b: a == b,
    "ne": lambda a, b: a != b,
    "lt": lambda a, b: a < b,
    "le": lambda a, b: a <= b,
    "gt": lambda a, b: a > b,
    "ge": lambda a, b: a >= b,
}


def arithmetic(machine: Machine, i: Instruction, mask: Mask | None) -> None:
    """Carry out an instruction of `OPERATIONS` on operands of its type."""
    kind, narrow = i.type, 0
    if i.parts[-2:-1] == ("f32",) and kind in (
        "f16",
        "bf16",
    ):  # add.f32.bf16: one operand, or two of fma, is BF16
        kind, narrow = "f32", 2 if i.base == "fma" else 1
    if kind == "f32x2":
        values = [_pair(machine, operand) for operand in i.operands[1:]]
    else:
        widened = [machine.read(operand, i.type).astype(np.float32) for operand in i.operands[1 : 1 + narrow]]
        values = widened + [machine.read(operand, kind) for operand in i.operands[1 + narrow :]]
    if "ftz" in i.parts:
        values = [_flushed(value) for value in values]
    result = OPERATIONS[i.base](i, values)
    if "ftz" in i.parts:
        result = _flushed(result)
    if kind == "f32x2":
        result = np.ascontiguousarray(result.astype(np.float32)).view(np.uint64)[:, 0]
    machine.write(i.operands[0], result, mask)


def _pair(machine: Machine, operand: Any) -> Array:
    """A 64-bit register as two FP32 [lanes, 2]."""
    return machine.read(operand, "b64").reshape(-1, 1).copy().view(np.float32)


def _flushed(values: Array) -> Array:
    """FP32 with subnormal numbers replaced by zeros of their sign."""
    return np.where(np.abs(values) < np.finfo(np.float32).tiny, np.copysign(np.float32(0), values), values)


def _mul(i: Instruction, values: list[Array]) -> Array:
    a, b = values
    if "wide" in i.parts:
        wide = f"{a.dtype.kind}{2 * a.dtype.itemsize}"
        return np.asarray(a.astype(wide) * b.astype(wide))
    if "hi" in i.parts:
        bits = 8 * a.dtype.itemsize
        if bits > 32:
            raise NotEmulated(i.text)
        wide = f"{a.dtype.kind}8"
        return np.asarray((a.astype(wide) * b.astype(wide)) >> bits).astype(a.dtype)
    return np.asarray(a * b)


def _fma(i: Instruction, values: list[Array]) -> Array:
    a, b, c = values
    if a.dtype != np.float32:
        raise NotEmulated(i.text)
    return (a.astype(np.float64) * b + c).astype(np.float32)


def _div(i: Instruction, values: list[Array]) -> Array:
    a, b = values
    if a.dtype.kind == "f":
        return np.asarray(a / b)
    quotient = np.abs(a.astype(np.int64)) // np.maximum(np.abs(b.astype(np.int64)), 1)
    return (quotient * np.sign(a).astype(np.int64) * np.sign(b)).astype(a.dtype)


def _rem(i: Instruction, values: list[Array]) -> Array:
    return np.asarray(values[0] - _div(i, values) * values[1])


def _extreme(floats: tuple[Any, Any], i: Instruction, values: list[Array]) -> Array:
    function = floats["NaN" in i.parts]
    result = values[0]
    for value in values[1:]:
        result = function(result, value)
    return np.asarray(result)


def _exp2(i: Instruction, values: list[Array]) -> Array:
    return np.exp2(values[0].astype(np.float64)).astype(np.float32)


OPERATIONS: dict[str, Callable[[Instruction, list[Array]], Array]] = {
    "add": lambda i, v: v[0] + v[1],
    "sub": lambda i, v: v[0] - v[1],
    "mul": _mul,
    "fma": _fma,
    "div": _div,
    "rem": _rem,
    "min": lambda i, v: _extreme((np.fmin, np.minimum), i, v),
    "max": lambda i, v: _extreme((np.fmax, np.maximum), i, v),
    "and": lambda i, v: v[0] & v[1],
    "or": lambda i, v: v[0] | v[1],
    "xor": lambda i, v: v[0] ^ v[1],
    "not": lambda i, v: ~v[0],
    "neg": lambda i, v: -v[0],
    "abs": lambda i, v: np.abs(v[0]),
    "ex2": _exp2,
    "rcp": lambda i, v: np.float32(1) / v[0],
    "sqrt": lambda i, v: np.sqrt(v[0]),
    "popc": lambda i, v: np.bitwise_count(v[0]).astype(np.uint32),
}


def multiply_add(machine: Machine, i: Instruction, mask: Mask | None) -> None:
    """`mad` of integers, whose addend is as wide as the product."""
    *_, kind = i.parts
    a, b = (machine.read(operand, kind) for operand in i.operands[1:3])
    product = _mul(i, [a, b])
    addend = machine.read(i.operands[3], f"{kind[0]}{8 * product.dtype.itemsize}")
    machine.write(i.operands[0], product + addend, mask)


def shift(machine: Machine, i: Instruction, mask: Mask | None) -> None:
    """`shl` and `shr`: a distance of the width or more shifts everything out."""
    values = machine.read(i.operands[1], i.type)
    distance = machine.read(i.operands[2], "u32").astype(np.int64)
    bits = 8 * values.dtype.itemsize
    within = np.minimum(distance, bits - 1).astype(values.dtype)
    if i.base == "shl":
        result = np.where(distance < bits, values << within, values.dtype.type(0))
    elif values.dtype.kind == "i":
        result = values >> within
    else:
        result = np.where(distance < bits, values >> within, values.dtype.type(0))
    machine.write(i.operands[0], result, mask)


def set_predicate(machine: Machine, i: Instruction, mask: Mask | None) -> None:
    """`setp`: comparisons of floats are false for NaN unless their name ends in u."""
    if len(i.parts) != 3 + ("ftz" in i.parts):
        raise NotEmulated(i.text)
    name, kind = i.parts[1], i.type
    a, b = (machine.read(operand, kind) for operand in i.operands[1:])
    if kind not in FLOATS:
        machine.write(i.operands[0], COMPARISONS[name](a, b), mask)
        return
    unordered = np.isnan(a) | np.isnan(b)
    if name in ("nan", "num"):
        result = unordered if name == "nan" else ~unordered
    elif name.endswith("u") and name[:-1] in COMPARISONS:
        result = COMPARISONS[name[:-1]](a, b) | unordered
    else:
        result = COMPARISONS[name](a, b) & ~unordered
    machine.write(i.operands[0], result, mask)


def select(machine: Machine, i: Instruction, mask: Mask | None) -> None:
    """`selp`: one of two values by a predicate."""
    a, b = (machine.read(operand, i.type) for operand in i.operands[1:3])
    machine.write(i.operands[0], np.where(machine.read(i.operands[3], "pred"), a, b), mask)


def move(machine: Machine, i: Instruction, mask: Mask | None) -> None:
    """`mov`, which also packs a vector into a register and unpacks it."""
    target, source = i.operands
    bits = 1 if i.type == "pred" else 8 * dtype_of(i.type).itemsize
    if isinstance(target, Vector):
        values = machine.read(source, i.type)
        width = bits // len(target.elements)
        for n, element in enumerate(target.elements):
            part = (values >> values.dtype.type(width * n)).astype(f"u{width // 8}")
            machine.write(element, part, mask)
    elif isinstance(source, Vector):
        width = bits // len(source.elements)
        packed = np.zeros(1, f"u{bits // 8}")
        for n, element in enumerate(source.elements):
            part = machine.read(element, f"b{width}").astype(packed.dtype)
            packed = packed | (part << packed.dtype.type(width * n))
        machine.write(target, packed, mask)
    else:
        machine.write(target, machine.read(source, i.type), mask)


def extract_bits(machine: Machine, i: Instruction, mask: Mask | None) -> None:
    """`bfe`: a field of bits, extended by its sign if the type is signed."""
    if i.type not in ("u32", "s32"):
        raise NotEmulated(i.text)
    values = machine.read(i.operands[1], "u32").astype(np.int64)
    start, length = (machine.read(operand, "u32").astype(np.int64) & 255 for operand in i.operands[2:])
    field = (values >> np.minimum(start, 32)) & ((1 << np.minimum(length, 32)) - 1)
    if i.type == "s32":
        sign = np.where(length > 0, (field >> np.maximum(length - 1, 0)) & 1, 0)
        field = np.where(sign == 1, field - (1 << np.minimum(length, 32)), field)
    machine.write(i.operands[0], (field & 0xFFFFFFFF).astype(np.uint32), mask)


def permute_bytes(machine: Machine, i: Instruction, mask: Mask | None) -> None:
    """`prmt`: four bytes chosen among eight, or the sign of each."""
    if i.parts != ("prmt", "b32"):
        raise NotEmulated(i.text)
    a, b, selector = (machine.lanes(operand, "b32").astype(np.uint64) for operand in i.operands[1:])
    both = a | (b << np.uint64(32))
    result = np.zeros(len(a), np.uint32)
    for n in range(4):
        choice = (selector >> np.uint64(4 * n)) & np.uint64(15)
        byte = (both >> (np.uint64(8) * (choice & np.uint64(7)))) & np.uint64(255)
        byte = np.where(choice & np.uint64(8), np.where(byte & np.uint64(128), 255, 0), byte)
        result |= byte.astype(np.uint32) << np.uint32(8 * n)
    machine.write(i.operands[0], result, mask)


Execute = Callable[[Machine, Instruction, Mask | None], None]
INSTRUCTIONS: dict[str, Execute] = {
    **dict.fromkeys(OPERATIONS, arithmetic),
    "mad": multiply_add,
    "shl": shift,
    "shr": shift,
    "setp": set_predicate,
    "selp": select,
    "mov": move,
    "bfe": extract_bits,
    "prmt": permute_bytes,
}
