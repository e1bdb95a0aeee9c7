"""Global and shared memory, with a check of every access.

Shared memory is checked in granules: the smallest number of bytes that the kernel accesses at once. A race is two
accesses to a granule by different warps, one of them a write, with no barrier of the block between them.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from nemotrt.plugins.emulator.registers import Array
from nemotrt.plugins.emulator.threads import Threads

BASE = 1 << 33
"""The lowest global address: more than 32 bits, so that a truncated address is out of bounds."""

GAP = 4096
"""Bytes between tensors that belong to none."""

SEVERAL = -2
"""The reader of a granule that several warps have read since the last barrier."""


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

    def locate(self, threads: Threads, addresses: Array, size: int, lanes: Array) -> Array:
        """Offsets of the accesses by these lanes; raises Fault if one is out of bounds or not aligned to its size."""
        offsets = addresses.astype(np.int64) - BASE
        inside = (offsets >= 0) & (offsets + size <= self._bytes.size)
        first = self._owner[np.where(inside, offsets, 0)]
        inside &= (first > 0) & (first == self._owner[np.where(inside, offsets + size - 1, 0)])
        if not inside.all():
            row = int(np.argmin(inside))
            raise threads.fault("out of bounds", int(lanes[row]), self.describe(int(addresses[row]), size))
        if (offsets % size).any():
            row = int(np.argmax(offsets % size != 0))
            what = f"misaligned for {size} bytes"
            raise threads.fault(what, int(lanes[row]), self.describe(int(addresses[row]), size))
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

    def locate(self, threads: Threads, addresses: Array, size: int, lanes: Array) -> Array:
        """Offsets of the accesses by these lanes; raises Fault if one is out of bounds or not aligned to its size."""
        addresses = addresses.astype(np.int64)
        inside = (addresses >= 0) & (addresses + size <= self.size)
        if not inside.all():
            row = int(np.argmin(inside))
            raise threads.fault("outside shared memory", int(lanes[row]), self.describe(addresses[row]))
        if (addresses % size).any():
            row = int(np.argmax(addresses % size != 0))
            raise threads.fault(
                f"misaligned for {size} bytes", int(lanes[row]), self.describe(addresses[row])
            )
        return addresses + threads.block[lanes] * self.stride

    def describe(self, address: int) -> str:
        """An address in a block's shared memory."""
        return f"shared+{address} of {self.size} bytes"

    def granules(self, offsets: Array, size: int) -> Array:
        """The granules [lanes, n] of accesses."""
        return np.asarray(offsets[:, None] // self.granule + np.arange(max(1, size // self.granule)))

    def load(self, offsets: Array, width: int, count: int) -> Array:
        """`count` elements of `width` bytes at each offset [lanes, count], unchecked."""
        return self._bytes.view(f"u{width}")[(offsets // width)[:, None] + np.arange(count)]

    def gather(self, offsets: Array, width: int) -> Array:
        """The element of `width` bytes at each offset, of any shape, unchecked."""
        return np.asarray(self._bytes.view(f"u{width}")[offsets // width])

    def read(self, threads: Threads, offsets: Array, width: int, count: int, lanes: Array) -> Array:
        """Elements [lanes, count]; raises Fault on a race, on data in flight and on bytes never written."""
        granules = self.granules(offsets, width * count)
        warp, epoch = threads.warp[lanes][:, None], threads.epoch[threads.block[lanes]][:, None]
        written = self.write_epoch[granules]
        problems = {
            "reads shared memory that a cp.async in flight writes": self.copies[granules] > 0,
            "reads shared memory that was never written": written < 0,
            "reads what another warp wrote, with no barrier in between": (written == epoch)
            & (self.write_warp[granules] != warp),
        }
        self._report(threads, problems, granules, lanes)
        others = (self._read_epoch[granules] == epoch) & (self._read_warp[granules] != warp)
        self._read_epoch[granules] = epoch
        self._read_warp[granules] = np.where(others, SEVERAL, warp)
        self._read_warp[granules[self._read_warp[granules] != warp]] = SEVERAL
        return self.load(offsets, width, count)

    def read_by_product(self, granules: Array, epoch: int) -> None:
        """Record a wgmma in flight that reads the granules."""
        self._read_epoch[granules] = epoch
        self._read_warp[granules] = SEVERAL
        self.products[granules] += 1

    def check_write(self, threads: Threads, granules: Array, lanes: Array) -> None:
        """Raise Fault if a write would race, or overwrite data in flight."""
        warp, epoch = threads.warp[lanes][:, None], threads.epoch[threads.block[lanes]][:, None]
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
        self._report(threads, problems, granules, lanes)

    def write(self, threads: Threads, offsets: Array, values: Array, lanes: Array) -> None:
        """Write elements [lanes, count]; raises Fault on a race and over data in flight."""
        self.check_write(threads, self.granules(offsets, values.dtype.itemsize * values.shape[1]), lanes)
        self.put(threads, offsets, values, lanes)
        width, count = values.dtype.itemsize, values.shape[1]
        if (differs := self.load(offsets, width, count) != values).any():
            row = int(np.argmax(differs.any(axis=1)))
            what = "two threads write different values to one address"
            raise threads.fault(what, int(lanes[row]), self.describe(int(offsets[row]) % self.stride))

    def put(self, threads: Threads, offsets: Array, values: Array, lanes: Array) -> None:
        """Write elements [lanes, count] and record the writers, unchecked."""
        width, count = values.dtype.itemsize, values.shape[1]
        granules = self.granules(offsets, width * count)
        self._bytes.view(f"u{width}")[(offsets // width)[:, None] + np.arange(count)] = values
        self.write_epoch[granules] = threads.epoch[threads.block[lanes]][:, None]
        self.write_warp[granules] = threads.warp[lanes][:, None]
        self.write_step[granules] = threads.steps

    def _report(self, threads: Threads, problems: Mapping[str, Array], granules: Array, lanes: Array) -> None:
        for what, wrong in problems.items():
            if wrong.any():
                row, column = np.argwhere(wrong)[0]
                address = int(granules[row, column]) * self.granule % self.stride
                raise threads.fault(what, int(lanes[row]), self.describe(address))
