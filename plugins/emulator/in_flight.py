"""Copies and products in flight, and the fences and groups that complete them.

A copy's data arrives when its thread waits for its group, and no earlier. A product's result is there at once, but to
touch its registers, or the shared memory that it reads, before its group was waited for is a fault.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from nemotrt.plugins.emulator.memory import SharedMemory
from nemotrt.plugins.emulator.ptx import Instruction, registers_of
from nemotrt.plugins.emulator.registers import Array, Mask
from nemotrt.plugins.emulator.threads import Threads


@dataclass
class Copy:
    """The copies of one instruction, a row for each thread."""

    lanes: Array
    group: Array
    offsets: Array
    data: Array

    def part(self, rows: Array) -> Copy:
        """Some of the rows."""
        return Copy(self.lanes[rows], self.group[rows], self.offsets[rows], self.data[rows])


class Copies:
    """The copies in flight, and how many groups each thread has committed."""

    def __init__(self, threads: Threads, shared: SharedMemory) -> None:
        self._threads, self._shared = threads, shared
        self._committed = np.zeros(threads.num_lanes, np.int64)
        self._in_flight: list[Copy] = []

    def start(self, offsets: Array, data: Array, lanes: Array) -> None:
        """Begin copies to offsets in shared memory; raises Fault if a write there would be wrong."""
        granules = self._shared.granules(offsets, data.dtype.itemsize * data.shape[1])
        self._shared.check_write(self._threads, granules, lanes)
        np.add.at(self._shared.copies, granules, 1)
        self._in_flight.append(Copy(lanes, self._committed[lanes], offsets, data))

    def commit(self, lanes: Array) -> None:
        """End the group of these threads."""
        self._committed[lanes] += 1

    def wait(self, lanes: Array, allowed: int) -> None:
        """Complete the copies of these threads, but for those of the last `allowed` groups."""
        waits = np.zeros(self._threads.num_lanes, bool)
        waits[lanes] = True
        remaining = []
        for copy in self._in_flight:
            done = waits[copy.lanes] & (copy.group < self._committed[copy.lanes] - allowed)
            if done.any():
                self._finish(copy.part(done))
            if not done.all():
                remaining.append(copy.part(~done))
        self._in_flight = remaining

    def _finish(self, copy: Copy) -> None:
        granules = self._shared.granules(copy.offsets, copy.data.dtype.itemsize * copy.data.shape[1])
        np.subtract.at(self._shared.copies, granules, 1)
        self._shared.put(self._threads, copy.offsets, copy.data, copy.lanes)


@dataclass
class Product:
    """A wgmma in flight: its warpgroups, their group, the granules that each reads, and the registers it uses."""

    warpgroups: Array
    group: Array
    granules: list[Array]
    registers: frozenset[str]


class Products:
    """The products in flight, and the fences of each warp."""

    def __init__(self, threads: Threads, shared: SharedMemory) -> None:
        self._threads, self._shared = threads, shared
        num_warpgroups = -(-threads.num_lanes // 128)
        self._committed = np.zeros(num_warpgroups, np.int64)
        self._in_flight: list[Product] = []
        self._unfenced: set[str] = set()
        self._fence_step = np.full(4 * num_warpgroups, -1, np.int64)
        self._fence_epoch = np.full(4 * num_warpgroups, -1, np.int64)

    def fence_proxy(self, lanes: Array) -> None:
        """Record a proxy fence of these threads."""
        warps = np.unique(self._threads.warp[lanes])
        self._fence_step[warps] = self._threads.steps
        self._fence_epoch[warps] = self._threads.epoch[self._threads.block[warps * 32]]

    def check_registers(self, i: Instruction, mask: Mask | None) -> None:
        """Raise Fault if an instruction touches a register of a product in flight."""
        if i.base == "wgmma":
            return
        self._unfenced.update(registers_of(i.operands[0]) if i.operands else ())
        if not self._in_flight:
            return
        active = np.unique(self._threads.lanes_of(mask) // 128)
        for product in self._in_flight:
            touched = product.registers & i.names
            if touched and np.isin(active, product.warpgroups).any():
                lane = int(self._threads.lanes_of(mask)[0])
                raise self._threads.fault(f"touches {min(touched)} of a wgmma that was not waited for", lane)

    def fence_registers(self) -> None:
        """Record that later products see the registers as they are now."""
        self._unfenced.clear()

    def start(self, product: Product) -> None:
        """Begin a product; raises Fault if its registers were changed after the last `wgmma.fence`."""
        if changed := self._unfenced & product.registers:
            lane = 128 * int(product.warpgroups[0])
            raise self._threads.fault(f"uses {min(changed)}, which changed after the last wgmma.fence", lane)
        product.group = self._committed[product.warpgroups]
        self._in_flight.append(product)
        for warpgroup, granules in zip(product.warpgroups, product.granules, strict=True):
            epoch = int(self._threads.epoch[self._threads.block[128 * warpgroup]])
            self._shared.read_by_product(granules, epoch)

    def commit(self, warpgroups: Array) -> None:
        """End the group of these warpgroups."""
        self._committed[warpgroups] += 1

    def wait(self, warpgroups: Array, allowed: int) -> None:
        """Complete the products of these warpgroups, but for those of the last `allowed` groups."""
        remaining = []
        for product in self._in_flight:
            done = np.isin(product.warpgroups, warpgroups)
            done &= product.group < self._committed[product.warpgroups] - allowed
            for n in np.flatnonzero(done):
                self._shared.products[product.granules[n]] -= 1
            if not done.all():
                granules = [product.granules[n] for n in np.flatnonzero(~done)]
                left = (product.warpgroups[~done], product.group[~done], granules, product.registers)
                remaining.append(Product(*left))
        self._in_flight = remaining

    def check_visible(self, granules: Array, warpgroup: int) -> None:
        """Raise Fault if a warpgroup's product may not see the granules as they were last written."""
        shared = self._shared
        epoch = self._threads.epoch[self._threads.block[128 * warpgroup]]
        written, writer = shared.write_epoch[granules], shared.write_warp[granules]
        fenced_by_writer = (shared.write_step[granules] < self._fence_step[writer]) & (
            (self._fence_epoch[writer] < epoch) | (writer // 4 == warpgroup)
        )
        own_fence = self._fence_epoch[4 * warpgroup : 4 * warpgroup + 4].min()
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
                raise self._threads.fault(what, 128 * warpgroup, shared.describe(address))
