"""Global and shared memory, with a check of every access, and the instructions `ld` and `st`.

Shared memory is checked in granules: the smallest number of bytes that the kernel accesses at once. A race is two
accesses to a granule by different warps, one of them a write, with no barrier of the block between them.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from nemotrt.plugins.emulator.errors import NotEmulated
from nemotrt.plugins.emulator.ptx import Address, Instruction, Program, Symbol
from nemotrt.plugins.emulator.registers import Array, Mask, dtype_of, elements

if TYPE_CHECKING:
    from nemotrt.plugins.emulator.machine import Machine

BASE = 1 << 33
"""The lowest global address: more than 32 bits, so that a truncated address is out of bounds."""

GAP = 4096
"""Bytes between tensors that belong to none."""

SEVERAL = -2
"""The reader of a granule that several warps have read since the last barrier."""

CACHE_HINTS = {"nc", "L1", "L2", "evict_last", "evict_first", "no_allocate", "relaxed", "cta"}


@dataclass(frozen=True)
class Buffer:
    """A tensor in global memory: its bytes, which the kernel may change, and the alignment that its address has."""

    content: Array
    alignment: int


class GlobalMemory:
    """Tensors in one address space, each followed by a gap; an address has no more alignment than was promised."""

    def __init__(self, buffers: Mapping[str, Buffer]) -> None:
        self._names = list(buffers)
        self._buffers = buffers
        self.address: dict[str, int] = {}
        end = GAP
        for name, buffer in buffers.items():
            end += -end % 256 + buffer.alignment
            self.address[name] = BASE + end
            end += buffer.content.size + GAP
        self._bytes = np.zeros(end + -end % 16, np.uint8)
        self._owner = np.zeros(self._bytes.size, np.int16)
        for number, (name, buffer) in enumerate(buffers.items(), 1):
            place = self._place(name)
            self._bytes[place] = buffer.content
            self._owner[place] = number

    def _place(self, name: str) -> slice:
        start = self.address[name] - BASE
        return slice(start, start + self._buffers[name].content.size)

    def copy_back(self) -> None:
        """Write the tensors' bytes back into the buffers."""
        for name, buffer in self._buffers.items():
            buffer.content[:] = self._bytes[self._place(name)]

    def locate(self, machine: Machine, addresses: Array, size: int, lanes: Array) -> Array:
        """Offsets of the accesses by these lanes; raises Fault if one is out of bounds or not aligned to its size."""
        offsets = addresses.astype(np.int64) - BASE
        inside = (offsets >= 0) & (offsets + size <= self._bytes.size)
        first = self._owner[np.where(inside, offsets, 0)]
        inside &= (first > 0) & (first == self._owner[np.where(inside, offsets + size - 1, 0)])
        if not inside.all():
            row = int(np.argmin(inside))
            raise machine.fault("out of bounds", int(lanes[row]), self.describe(int(addresses[row]), size))
        if (offsets % size).any():
            row = int(np.argmax(offsets % size != 0))
            what = f"misaligned for {size} bytes"
            raise machine.fault(what, int(lanes[row]), self.describe(int(addresses[row]), size))
        return offsets

    def describe(self, address: int, size: int) -> str:
        """An address relative to the nearest tensor."""
        if not self._names:
            return f"{address:#x}"

        def distance(name: str) -> int:
            start = self.address[name]
            return max(start - address, address + size - start - self._buffers[name].content.size, 0)

        nearest = min(self._names, key=distance)
        total = self._buffers[nearest].content.size
        return f"{size} bytes at {nearest}{address - self.address[nearest]:+d} of {total} bytes"

    def load(self, offsets: Array, width: int, count: int) -> Array:
        """`count` elements of `width` bytes at each offset [lanes, count]."""
        return self._bytes.view(f"u{width}")[(offsets // width)[:, None] + np.arange(count)]

    def store(self, offsets: Array, values: Array) -> None:
        """Write elements [lanes, count] at each offset."""
        width, count = values.dtype.itemsize, values.shape[1]
        self._bytes.view(f"u{width}")[(offsets // width)[:, None] + np.arange(count)] = values


class SharedMemory:
    """The shared memory of several blocks, one after another, and who accessed each granule since which barrier."""

    def __init__(self, size: int, num_blocks: int, granule: int) -> None:
        self.size = size
        self.stride = size + -size % 128
        self.granule = granule
        self._bytes = np.full(max(self.stride, 128) * num_blocks, 0xFF, np.uint8)
        count = self._bytes.size // granule
        self.write_epoch = np.full(count, -1, np.int32)
        """The number of barriers before the last write; -1 if there was none."""
        self.write_warp = np.full(count, -1, np.int32)
        self.write_step = np.zeros(count, np.int64)
        """The machine's step of the last write."""
        self._read_epoch = np.full(count, -1, np.int32)
        self._read_warp = np.full(count, -1, np.int32)
        self.copies = np.zeros(count, np.int16)
        """The number of cp.async in flight that write a granule."""
        self.products = np.zeros(count, np.int16)
        """The number of wgmma in flight that read a granule."""

    def locate(self, machine: Machine, addresses: Array, size: int, lanes: Array) -> Array:
        """Offsets of the accesses by these lanes; raises Fault if one is out of bounds or not aligned to its size."""
        addresses = addresses.astype(np.int64)
        inside = (addresses >= 0) & (addresses + size <= self.size)
        if not inside.all():
            row = int(np.argmin(inside))
            raise machine.fault("outside shared memory", int(lanes[row]), self.describe(addresses[row]))
        if (addresses % size).any():
            row = int(np.argmax(addresses % size != 0))
            raise machine.fault(f"misaligned for {size} bytes", int(lanes[row]), self.describe(addresses[row]))
        return addresses + machine.block[lanes] * self.stride

    def describe(self, address: int) -> str:
        """An address in a block's shared memory."""
        return f"shared+{address} of {self.size} bytes"

    def granules(self, offsets: Array, size: int) -> Array:
        """The granules [lanes, n] of accesses."""
        return (offsets // self.granule)[:, None] + np.arange(max(1, size // self.granule))

    def load(self, offsets: Array, width: int, count: int) -> Array:
        """`count` elements of `width` bytes at each offset [lanes, count], unchecked."""
        return self._bytes.view(f"u{width}")[(offsets // width)[:, None] + np.arange(count)]

    def gather(self, offsets: Array, width: int) -> Array:
        """The element of `width` bytes at each offset, of any shape, unchecked."""
        return self._bytes.view(f"u{width}")[offsets // width]

    def read(self, machine: Machine, offsets: Array, width: int, count: int, lanes: Array) -> Array:
        """Elements [lanes, count]; raises Fault on a race, on data in flight and on bytes never written."""
        granules = self.granules(offsets, width * count)
        warp, epoch = machine.warp[lanes][:, None], machine.epoch[machine.block[lanes]][:, None]
        written = self.write_epoch[granules]
        problems = {
            "reads shared memory that a cp.async in flight writes": self.copies[granules] > 0,
            "reads shared memory that was never written": written < 0,
            "reads what another warp wrote, with no barrier in between": (written == epoch)
            & (self.write_warp[granules] != warp),
        }
        self._report(machine, problems, granules, lanes)
        others = (self._read_epoch[granules] == epoch) & (self._read_warp[granules] != warp)
        self._read_epoch[granules] = epoch
        self._read_warp[granules] = np.where(others, SEVERAL, warp)
        self._read_warp[granules[self._read_warp[granules] != warp]] = SEVERAL
        return self.load(offsets, width, count)

    def read_by_product(self, granules: Array, epoch: int) -> None:
        """Record a wgmma in flight that reads the granules."""
        self._read_epoch[granules] = epoch
        self._read_warp[granules] = SEVERAL
        np.add.at(self.products, granules, 1)

    def check_write(self, machine: Machine, granules: Array, lanes: Array) -> None:
        """Raise Fault if a write would race, or overwrite data in flight."""
        warp, epoch = machine.warp[lanes][:, None], machine.epoch[machine.block[lanes]][:, None]
        problems = {
            "writes over a cp.async in flight": self.copies[granules] > 0,
            "writes over what a wgmma in flight reads": self.products[granules] > 0,
            "writes over what another warp wrote, with no barrier in between": (
                self.write_epoch[granules] == epoch
            )
            & (self.write_warp[granules] != warp),
            "writes over what another warp read, with no barrier in between": (
                self._read_epoch[granules] == epoch
            )
            & (self._read_warp[granules] != warp),
        }
        self._report(machine, problems, granules, lanes)

    def write(self, machine: Machine, offsets: Array, values: Array, lanes: Array) -> None:
        """Write elements [lanes, count]; raises Fault on a race and over data in flight."""
        self.check_write(machine, self.granules(offsets, values.dtype.itemsize * values.shape[1]), lanes)
        self.put(machine, offsets, values, lanes)
        width, count = values.dtype.itemsize, values.shape[1]
        if (differs := self.load(offsets, width, count) != values).any():
            row = int(np.argmax(differs.any(axis=1)))
            what = "two threads write different values to one address"
            raise machine.fault(what, int(lanes[row]), self.describe(int(offsets[row]) % self.stride))

    def put(self, machine: Machine, offsets: Array, values: Array, lanes: Array) -> None:
        """Write elements [lanes, count] and record the writers, unchecked."""
        width, count = values.dtype.itemsize, values.shape[1]
        granules = self.granules(offsets, width * count)
        self._bytes.view(f"u{width}")[(offsets // width)[:, None] + np.arange(count)] = values
        self.write_epoch[granules] = machine.epoch[machine.block[lanes]][:, None]
        self.write_warp[granules] = machine.warp[lanes][:, None]
        self.write_step[granules] = machine.steps

    def _report(self, machine: Machine, problems: Mapping[str, Array], granules: Array, lanes: Array) -> None:
        for what, wrong in problems.items():
            if wrong.any():
                row, column = np.argwhere(wrong)[0]
                address = int(granules[row, column]) * self.granule % self.stride
                raise machine.fault(what, int(lanes[row]), self.describe(address))


def granule_of(program: Program) -> int:
    """The smallest number of bytes that the kernel accesses at once in shared memory."""
    sizes = [16]
    for i in program.instructions:
        if i.base in ("ld", "st") and i.parts[1] == "shared":
            sizes.append(_width_and_count(i)[0] * _width_and_count(i)[1])
        elif i.parts[:2] == ("cp", "async") and len(i.operands) > 2:
            sizes.append(int(getattr(i.operands[2], "bits", 4)))
        elif i.base == "wgmma" and "e4m3" in i.parts:
            sizes.append(1)
        elif i.base == "wgmma":
            sizes.append(2)
    return min(sizes)


def _width_and_count(i: Instruction) -> tuple[int, int]:
    """Bytes of an element, and the number of elements."""
    vectors = [int(part[1:]) for part in i.parts if part in ("v2", "v4", "v8")]
    return dtype_of(i.type).itemsize, vectors[0] if vectors else 1


def address_of(machine: Machine, operand: object, lanes: Array, kind: str) -> Array:
    """The addresses of these lanes."""
    if not isinstance(operand, Address):
        raise NotEmulated(f"the address {operand}")
    values = machine.registers.lanes(operand.base, kind)[lanes]
    return values.astype(np.int64) + operand.offset


def _space(i: Instruction) -> str:
    unknown = [part for part in i.parts[2:-1] if part not in CACHE_HINTS and part not in ("v2", "v4", "v8")]
    if unknown or len(i.operands) != 2:
        raise NotEmulated(i.text)
    return i.parts[1]


def load(machine: Machine, i: Instruction, mask: Mask | None) -> None:
    """`ld` from parameters, global memory or shared memory."""
    space = _space(i)
    target, source = i.operands
    if space == "param":
        assert isinstance(source, Address)
        assert isinstance(source.base, Symbol)
        bits = machine.arguments[source.base.name]
        storage = np.dtype(f"u{dtype_of(i.type).itemsize}")
        machine.write(target, np.array([bits & np.iinfo(storage).max], storage), mask)
        return
    lanes = machine.lanes_of(mask)
    width, count = _width_and_count(i)
    if space == "global":
        addresses = address_of(machine, source, lanes, "u64")
        offsets = machine.global_memory.locate(machine, addresses, width * count, lanes)
        values = machine.global_memory.load(offsets, width, count)
    elif space == "shared":
        addresses = address_of(machine, source, lanes, "u32")
        offsets = machine.shared_memory.locate(machine, addresses, width * count, lanes)
        values = machine.shared_memory.read(machine, offsets, width, count, lanes)
    else:
        raise NotEmulated(i.text)
    signed = values.view(f"i{width}") if i.type.startswith("s") else values
    for n, element in enumerate(elements(target)):
        machine.write_lanes(element, signed[:, n], lanes, mask)


def store(machine: Machine, i: Instruction, mask: Mask | None) -> None:
    """`st` to global or shared memory."""
    space = _space(i)
    target, source = i.operands
    lanes = machine.lanes_of(mask)
    width, count = _width_and_count(i)
    columns = [machine.registers.lanes(element, f"b{8 * width}")[lanes] for element in elements(source)]
    values = np.stack(columns, axis=1)
    if space == "global":
        addresses = address_of(machine, target, lanes, "u64")
        offsets = machine.global_memory.locate(machine, addresses, width * count, lanes)
        machine.global_memory.store(offsets, values)
    elif space == "shared":
        addresses = address_of(machine, target, lanes, "u32")
        offsets = machine.shared_memory.locate(machine, addresses, width * count, lanes)
        machine.shared_memory.write(machine, offsets, values, lanes)
    else:
        raise NotEmulated(i.text)


INSTRUCTIONS = {"ld": load, "st": store}
