"""Tensor-core instructions of a warpgroup (SM 90): `wgmma` with its descriptors, fences and groups.

The layouts are those of the PTX ISA, sections "Register fragments and shared memory matrix layouts" and "Matrix
descriptor". A product's result is there at once, but to touch its registers, or the shared memory that it reads,
before its group was waited for is a fault. Products accumulate in FP32; those of E4M3 do on a GPU with about 14 bits.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from nemotrt.plugins.emulator.conversions import E4M3
from nemotrt.plugins.emulator.errors import NotEmulated
from nemotrt.plugins.emulator.matrices import unpacked
from nemotrt.plugins.emulator.ptx import Immediate, Instruction, Operand, Vector, registers_of
from nemotrt.plugins.emulator.registers import Array, Mask, dtype_of, elements

if TYPE_CHECKING:
    from nemotrt.plugins.emulator.machine import Machine

SWIZZLES = {0: (16, 0), 1: (128, 7), 2: (64, 3), 3: (32, 1)}
"""By the two highest bits of a descriptor: bytes of a row, and the address bits above 7 that its chunks are XORed with."""

THREAD = np.arange(128)
ROW, COLUMN = THREAD // 32 * 16 + THREAD % 32 // 4, 2 * (THREAD % 4)
"""A thread's first row and column in the 64 × 8 blocks of an accumulator."""


@dataclass
class Product:
    """A wgmma in flight: its warpgroups, their group, the granules that each reads, and the registers it uses."""

    warpgroups: Array
    group: Array
    granules: list[Array]
    registers: frozenset[str]


class Products:
    """The products in flight, and the fences of each warp."""

    def __init__(self, num_warpgroups: int) -> None:
        self._committed = np.zeros(num_warpgroups, np.int64)
        self._in_flight: list[Product] = []
        self._unfenced: set[str] = set()
        self.fence_step = np.full(4 * num_warpgroups + 4, -1, np.int64)
        self.fence_epoch = np.full(4 * num_warpgroups + 4, -1, np.int64)

    def fence_proxy(self, machine: Machine, lanes: Array) -> None:
        """Record a proxy fence of these threads."""
        warps = np.unique(machine.warp[lanes])
        self.fence_step[warps] = machine.steps
        self.fence_epoch[warps] = machine.epoch[machine.block[warps * 32]]

    def check_registers(self, machine: Machine, i: Instruction, mask: Mask | None) -> None:
        """Raise Fault if an instruction touches a register of a product in flight."""
        if i.base == "wgmma":
            return
        self._unfenced.update(registers_of(i.operands[0]) if i.operands else ())
        if not self._in_flight:
            return
        active = np.unique(machine.lanes_of(mask) // 128)
        for product in self._in_flight:
            touched = product.registers & i.names
            if touched and np.isin(active, product.warpgroups).any():
                lane = int(machine.lanes_of(mask)[0])
                raise machine.fault(f"touches {min(touched)} of a wgmma that was not waited for", lane)

    def fence_registers(self) -> None:
        """Record that later products see the registers as they are now."""
        self._unfenced.clear()

    def start(self, machine: Machine, product: Product) -> None:
        """Begin a product; raises Fault if its registers were changed after the last `wgmma.fence`."""
        if changed := self._unfenced & product.registers:
            lane = 128 * int(product.warpgroups[0])
            raise machine.fault(f"uses {min(changed)}, which changed after the last wgmma.fence", lane)
        product.group = self._committed[product.warpgroups]
        self._in_flight.append(product)
        for warpgroup, granules in zip(product.warpgroups, product.granules, strict=True):
            epoch = int(machine.epoch[machine.block[128 * warpgroup]])
            machine.shared_memory.read_by_product(granules, epoch)

    def commit(self, warpgroups: Array) -> None:
        """End the group of these warpgroups."""
        self._committed[warpgroups] += 1

    def wait(self, machine: Machine, warpgroups: Array, allowed: int) -> None:
        """Complete the products of these warpgroups, but for those of the last `allowed` groups."""
        remaining = []
        for product in self._in_flight:
            done = np.isin(product.warpgroups, warpgroups)
            done &= product.group < self._committed[product.warpgroups] - allowed
            for n in np.flatnonzero(done):
                np.subtract.at(machine.shared_memory.products, product.granules[n], 1)
            if not done.all():
                granules = [product.granules[n] for n in np.flatnonzero(~done)]
                left = (product.warpgroups[~done], product.group[~done], granules, product.registers)
                remaining.append(Product(*left))
        self._in_flight = remaining


def _offsets(descriptor: int, rows: int, depth: int, width: int, transposed: bool) -> Array:
    """Addresses in shared memory of the elements [rows, depth] that a descriptor names."""
    start, leading, stride = (((descriptor >> shift) & 0x3FFF) << 4 for shift in (0, 16, 32))
    chunk, swizzled = SWIZZLES[descriptor >> 62]
    if (descriptor >> 49) & 7 or transposed and not swizzled:
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
    address: Array = start + offset
    return address ^ (((address >> 7) & swizzled) << 4)


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
        granules.append(np.unique(offsets // machine.shared_memory.granule))
        check_visible(machine, granules[-1], int(warpgroup))
        bits = machine.shared_memory.gather(offsets, width)
        values.append(bits.view(E4M3 if kind == "e4m3" else dtype_of(kind)).astype(np.float32).reshape(shape))
    return np.stack(values), granules


def check_visible(machine: Machine, granules: Array, warpgroup: int) -> None:
    """Raise Fault if a warpgroup's product may not see the granules as they were last written."""
    shared, products = machine.shared_memory, machine.products
    epoch = machine.epoch[machine.block[128 * warpgroup]]
    written, writer = shared.write_epoch[granules], shared.write_warp[granules]
    fenced_by_writer = (shared.write_step[granules] < products.fence_step[writer]) & (
        (products.fence_epoch[writer] < epoch) | (writer // 4 == warpgroup)
    )
    own_fence = products.fence_epoch[4 * warpgroup : 4 * warpgroup + 4].min()
    problems = {
        "wgmma reads shared memory that a cp.async in flight writes": shared.copies[granules] > 0,
        "wgmma reads shared memory that was never written": written < 0,
        "wgmma reads what was written since the last barrier": written == epoch,
        "wgmma reads what was written with no proxy fence in between": ~fenced_by_writer
        & (written >= own_fence),
    }
    for what, wrong in problems.items():
        if wrong.any():
            address = int(granules[np.argmax(wrong)]) * shared.granule % shared.stride
            raise machine.fault(what, 128 * warpgroup, shared.describe(address))


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
        machine.products.wait(machine, warpgroups, allowed.bits)
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
    machine.products.start(machine, Product(warpgroups, warpgroups, granules, registers))

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
