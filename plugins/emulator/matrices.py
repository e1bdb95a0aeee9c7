"""Tensor-core instructions of a warp: `ldmatrix`, `stmatrix` and `mma.sync`.

The layouts of the fragments are those of the PTX ISA, sections "Matrix fragments for mma". Products accumulate in FP32.
"""

from __future__ import annotations

import numpy as np

from nemotrt.plugins.emulator.conversions import E4M3
from nemotrt.plugins.emulator.errors import NotEmulated
from nemotrt.plugins.emulator.loads import address_of
from nemotrt.plugins.emulator.machine import Machine
from nemotrt.plugins.emulator.ptx import Instruction, Operand
from nemotrt.plugins.emulator.registers import Array, Mask, dtype_of, elements
from nemotrt.plugins.emulator.warps import check_whole_warps

LANE = np.arange(32)
QUAD, PAIR = LANE // 4, 2 * (LANE % 4)
"""A lane's row, and its first column of 16-bit values, in a fragment of 8 × 8."""

SHAPES = {"m16n8k16": ("f16", "bf16"), "m16n8k32": ("e4m3",)}


def _rows(machine: Machine, i: Instruction, address: Operand) -> tuple[Array, Array]:
    """The lanes that point to rows of 16 bytes, and their addresses."""
    count = int(next(part[1:] for part in i.parts if part in ("x1", "x2", "x4")))
    lanes = np.flatnonzero(machine.thread % 32 < 8 * count)
    return lanes, address_of(machine, address, lanes, "u32")


def _only(mask: Mask | None, lanes: Array, *arrays: Array) -> list[Array]:
    kept = slice(None) if mask is None else mask[lanes]
    return [array[kept] for array in (lanes, *arrays)]


def load_matrix(machine: Machine, i: Instruction, mask: Mask | None) -> None:
    """`ldmatrix` of 1, 2 or 4 matrices of 8 × 8 16-bit values."""
    check_whole_warps(machine, mask)
    if i.type != "b16" or "m8n8" not in i.parts:
        raise NotEmulated(i.text)
    targets = elements(i.operands[0])
    lanes, addresses = _rows(machine, i, i.operands[1])
    data = np.zeros((len(lanes), 8), np.uint16)
    active, addresses = _only(mask, lanes, addresses)
    offsets = machine.shared_memory.locate(machine, addresses, 16, active)
    rows = machine.shared_memory.read(machine, offsets, 2, 8, active)
    data[slice(None) if mask is None else mask[lanes]] = rows
    matrices = data.reshape(-1, len(targets), 8, 8)
    if "trans" in i.parts:
        matrices = matrices.swapaxes(2, 3)
    for n, target in enumerate(targets):
        low, high = (matrices[:, n, QUAD, PAIR + j].astype(np.uint32) for j in (0, 1))
        machine.write(target, (low | high << np.uint32(16)).reshape(-1), mask)


def store_matrix(machine: Machine, i: Instruction, mask: Mask | None) -> None:
    """`stmatrix` of 1, 2 or 4 matrices of 8 × 8 16-bit values."""
    check_whole_warps(machine, mask)
    if i.type != "b16" or "m8n8" not in i.parts:
        raise NotEmulated(i.text)
    sources = elements(i.operands[1])
    lanes, addresses = _rows(machine, i, i.operands[0])
    matrices = np.zeros((machine.num_lanes // 32, len(sources), 8, 8), np.uint16)
    for n, source in enumerate(sources):
        values = machine.lanes(source, "b32").reshape(-1, 32)
        matrices[:, n, QUAD, PAIR] = values.astype(np.uint16)
        matrices[:, n, QUAD, PAIR + 1] = (values >> np.uint32(16)).astype(np.uint16)
    if "trans" in i.parts:
        matrices = matrices.swapaxes(2, 3)
    data = np.ascontiguousarray(matrices).reshape(-1, 8)
    active, addresses, data = _only(mask, lanes, addresses, data)
    offsets = machine.shared_memory.locate(machine, addresses, 16, active)
    machine.shared_memory.write(machine, offsets, data, active)


def unpacked(machine: Machine, operand: Operand, kind: str) -> Array:
    """The values in a 32-bit register [lanes, 2 or 4] in FP32."""
    packed = np.ascontiguousarray(machine.lanes(operand, "b32")).reshape(-1, 1)
    dtype = E4M3 if kind == "e4m3" else dtype_of(kind)
    return packed.view(dtype).astype(np.float32)


def multiply(machine: Machine, i: Instruction, mask: Mask | None) -> None:
    """`mma.sync` m16n8k16 of FP16 or BF16, or m16n8k32 of E4M3, with FP32 sums."""
    check_whole_warps(machine, mask)
    shape, *layouts, d_kind, kind, b_kind, c_kind = i.parts[3:]
    if (
        layouts != ["row", "col"]
        or kind not in SHAPES.get(shape, ())
        or (b_kind, d_kind, c_kind) != (kind, "f32", "f32")
    ):
        raise NotEmulated(i.text)
    d, a, b, c = (elements(operand) for operand in i.operands)
    per = 4 if kind == "e4m3" else 2
    num_warps, depth = machine.num_lanes // 32, 8 * per
    left, right = np.zeros((num_warps, 16, depth), np.float32), np.zeros((num_warps, depth, 8), np.float32)
    first = per * (LANE % 4)
    for n, operand in enumerate(a):
        values = unpacked(machine, operand, kind).reshape(num_warps, 32, per)
        for j in range(per):
            left[:, QUAD + 8 * (n % 2), first + 4 * per * (n // 2) + j] = values[:, :, j]
    for n, operand in enumerate(b):
        values = unpacked(machine, operand, kind).reshape(num_warps, 32, per)
        for j in range(per):
            right[:, first + 4 * per * n + j, QUAD] = values[:, :, j]
    product = left @ right
    for n, (target, addend) in enumerate(zip(d, c, strict=True)):
        part = product[:, QUAD + 8 * (n // 2), PAIR + n % 2].reshape(-1)
        machine.write(target, part + machine.lanes(addend, "f32"), mask)


INSTRUCTIONS = {"ldmatrix": load_matrix, "stmatrix": store_matrix, "mma": multiply}
