"""Tensor-core instructions of a warpgroup (SM 90): `wgmma` with its descriptors, fences and groups.

The layouts are those of the PTX ISA, sections "Register fragments and shared memory matrix layouts" and "Matrix
descriptor". A product's result is there at once, but to touch its registers, or the shared memory that it reads,
before its group was waited for is a fault. Products accumulate in FP32; those of E4M3 do on a GPU with about 14 bits.
"""

from __future__ import annotations

import re

import numpy as np

from nemotrt.plugins.emulator.conversions import E4M3
from nemotrt.plugins.emulator.errors import NotEmulated
from nemotrt.plugins.emulator.in_flight import Product
from nemotrt.plugins.emulator.machine import Machine
from nemotrt.plugins.emulator.matrices import unpacked
from nemotrt.plugins.emulator.ptx import Immediate, Instruction, Operand, Vector, registers_of
from nemotrt.plugins.emulator.registers import Array, Mask, dtype_of, elements

SWIZZLES = {0: (16, 0), 1: (128, 7), 2: (64, 3), 3: (32, 1)}
"""By a descriptor's two highest bits: bytes of a row, and the mask of the address bits from 7 on that are XORed."""

THREAD = np.arange(128)
ROW, COLUMN = THREAD // 32 * 16 + THREAD % 32 // 4, 2 * (THREAD % 4)
"""A thread's first row and column in the 64 × 8 blocks of an accumulator."""


def _offsets(descriptor: int, rows: int, depth: int, width: int, transposed: bool) -> Array:
    """Addresses in shared memory of the elements [rows, depth] that a descriptor names."""
    start, leading, stride = (((descriptor >> shift) & 0x3FFF) << 4 for shift in (0, 16, 32))
    chunk, swizzled = SWIZZLES[descriptor >> 62]
    if (descriptor >> 49) & 7 or (transposed and not swizzled):
        raise NotEmulated(f"the matrix descriptor {descriptor:#x}")
    row, column = np.arange(rows)[:, None], np.arange(depth)[None, :]
    if transposed:
        per = chunk // width
        offset = row // per * leading + column // 8 * stride + column % 8 * chunk + row % per * width
    else:
        byte = column * width
        offset = row // 8 * stride + row % 8 * chunk + byte % chunk
        if not swizzled:
            offset = offset + byte // chunk * leading
    address = start + offset
    return np.asarray(address ^ (((address >> 7) & swizzled) << 4))


def _matrix(
    machine: Machine, operand: Operand, warpgroups: Array, shape: tuple[int, int], kind: str, transposed: bool
) -> tuple[Array, list[Array]]:
    """The values [warpgroups, rows, depth] that descriptors name, and the granules of each; raises Fault."""
    width = 1 if kind == "e4m3" else 2
    descriptors = machine.lanes(operand, "b64").reshape(-1, 128)[warpgroups]
    if (differs := (descriptors != descriptors[:, :1]).any(axis=1)).any():
        lane = 128 * int(warpgroups[np.argmax(differs)])
        raise machine.fault("a matrix descriptor that differs within a warpgroup", lane)
    values, granules = [], []
    for warpgroup, (descriptor, *_) in zip(warpgroups, descriptors, strict=True):
        addresses = _offsets(int(descriptor), *shape, width, transposed)
        lanes = np.full(addresses.size, 128 * warpgroup)
        offsets = machine.shared_memory.locate(machine, addresses.reshape(-1), width, lanes)
        granules.append(machine.shared_memory.granules(offsets, width).reshape(-1))
        machine.products.check_visible(granules[-1], int(warpgroup))
        bits = machine.shared_memory.gather(offsets, width)
        values.append(bits.view(E4M3 if kind == "e4m3" else dtype_of(kind)).astype(np.float32).reshape(shape))
    return np.stack(values), granules


def multiply(machine: Machine, i: Instruction, mask: Mask | None) -> None:
    """`wgmma.mma_async` of FP16, BF16 or E4M3 with FP32 sums, and its fences and groups."""
    active = np.ones(machine.num_lanes, bool) if mask is None else mask
    groups = active.reshape(-1, 128)
    if (groups.any(axis=1) & ~groups.all(axis=1)).any():
        raise machine.fault("not reached by the whole warpgroup")
    warpgroups = np.flatnonzero(groups.all(axis=1))
    if i.parts[1] == "fence":
        machine.products.fence_registers()
    elif i.parts[1] == "commit_group":
        machine.products.commit(warpgroups)
    elif i.parts[1] == "wait_group":
        allowed = i.operands[0]
        assert isinstance(allowed, Immediate)
        machine.products.wait(warpgroups, allowed.bits)
    else:
        _multiply(machine, i, mask, warpgroups)


def _multiply(machine: Machine, i: Instruction, mask: Mask | None, warpgroups: Array) -> None:
    shape = re.fullmatch(r"m64n(\d+)k(\d+)", i.parts[4])
    kind = i.parts[6]
    if shape is None or i.parts[5] != "f32" or kind not in ("f16", "bf16", "e4m3") or i.parts[7] != kind:
        raise NotEmulated(i.text)
    num_columns, depth = int(shape[1]), int(shape[2])
    sums, a, b, keep, *rest = i.operands
    factors = [operand.bits for operand in rest if isinstance(operand, Immediate)]
    if factors[:2] != [1, 1] or len(factors) != len(rest):
        raise NotEmulated(i.text)
    transposed = [bool(bit) for bit in factors[2:]]
    granules: list[Array] = [np.zeros(0, np.int64)] * len(warpgroups)
    if isinstance(a, Vector):
        left = _fragment(machine, a, kind, warpgroups, depth)
    else:
        is_transposed = len(transposed) == 2 and transposed[0]
        left, granules = _matrix(machine, a, warpgroups, (64, depth), kind, is_transposed)
    is_transposed = bool(transposed) and transposed[-1]
    right, more = _matrix(machine, b, warpgroups, (num_columns, depth), kind, is_transposed)
    granules = [np.concatenate(pair) for pair in zip(granules, more, strict=True)]
    registers = frozenset(registers_of(sums)) | frozenset(registers_of(a) if isinstance(a, Vector) else ())
    machine.products.start(Product(warpgroups, warpgroups, granules, registers))

    product = left @ right.swapaxes(1, 2)
    is_kept = machine.lanes(keep, "pred")
    everywhere = np.zeros((machine.num_lanes // 128, 128), np.float32)
    for n, target in enumerate(elements(sums)):
        everywhere[warpgroups] = product[:, ROW + 8 * (n // 2 % 2), COLUMN + 8 * (n // 4) + n % 2]
        before = np.where(is_kept, machine.lanes(target, "f32"), np.float32(0))
        machine.write(target, before + everywhere.reshape(-1), mask)


def _fragment(machine: Machine, a: Vector, kind: str, warpgroups: Array, depth: int) -> Array:
    """A matrix [warpgroups, 64, depth] in registers."""
    per = 4 if kind == "e4m3" else 2
    matrix = np.zeros((len(warpgroups), 64, depth), np.float32)
    for n, operand in enumerate(a.elements):
        values = unpacked(machine, operand, kind).reshape(-1, 128, per)[warpgroups]
        for j in range(per):
            matrix[:, ROW + 8 * (n % 2), per * (THREAD % 4) + 4 * per * (n // 2) + j] = values[:, :, j]
    return matrix


INSTRUCTIONS = {"wgmma": multiply}
