"""`cp.async` from global to shared memory with its groups, and proxy fences.

A copy's data arrives when its thread waits for its group, and no earlier. Bulk copies (TMA) and mbarriers are not
emulated.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from nemotrt.plugins.emulator.errors import NotEmulated
from nemotrt.plugins.emulator.memory import address_of
from nemotrt.plugins.emulator.ptx import Immediate, Instruction
from nemotrt.plugins.emulator.registers import Array, Mask

if TYPE_CHECKING:
    from nemotrt.plugins.emulator.machine import Machine


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

    def __init__(self, num_lanes: int) -> None:
        self._committed = np.zeros(num_lanes, np.int64)
        self._in_flight: list[Copy] = []

    def start(self, machine: Machine, offsets: Array, data: Array, lanes: Array) -> None:
        """Begin copies to offsets in shared memory; raises Fault if a write there would be wrong."""
        shared = machine.shared_memory
        granules = shared.granules(offsets, data.dtype.itemsize * data.shape[1])
        shared.check_write(machine, granules, lanes)
        np.add.at(shared.copies, granules, 1)
        self._in_flight.append(Copy(lanes, self._committed[lanes], offsets, data))

    def commit(self, lanes: Array) -> None:
        """End the group of these threads."""
        self._committed[lanes] += 1

    def wait(self, machine: Machine, lanes: Array, allowed: int) -> None:
        """Complete the copies of these threads, but for those of the last `allowed` groups."""
        waits = np.zeros(machine.num_lanes, bool)
        waits[lanes] = True
        remaining = []
        for copy in self._in_flight:
            done = waits[copy.lanes] & (copy.group < self._committed[copy.lanes] - allowed)
            if done.any():
                self._finish(machine, copy.part(done))
            if not done.all():
                remaining.append(copy.part(~done))
        self._in_flight = remaining

    @staticmethod
    def _finish(machine: Machine, copy: Copy) -> None:
        shared = machine.shared_memory
        granules = shared.granules(copy.offsets, copy.data.dtype.itemsize * copy.data.shape[1])
        np.subtract.at(shared.copies, granules, 1)
        shared.put(machine, copy.offsets, copy.data, copy.lanes)


def copy_async(machine: Machine, i: Instruction, mask: Mask | None) -> None:
    """`cp.async` of 4, 8 or 16 bytes, of which the source has all or none, and its groups."""
    lanes = machine.lanes_of(mask)
    if i.parts[2:] == ("commit_group",):
        machine.copies.commit(lanes)
        return
    if i.parts[2:] == ("wait_group",):
        (count,) = i.operands
        assert isinstance(count, Immediate)
        machine.copies.wait(machine, lanes, count.bits)
        return
    if i.parts[1] != "async" or i.parts[2] not in ("ca", "cg") or len(i.operands) not in (3, 4):
        raise NotEmulated(i.text)
    target, source, width, *source_bytes = i.operands
    assert isinstance(width, Immediate)
    size = width.bits
    data = np.zeros((len(lanes), size // 4), np.uint32)
    present = np.ones(len(lanes), bool)
    if source_bytes:
        given = machine.lanes(source_bytes[0], "u32")[lanes]
        if not np.isin(given, (0, size)).all():
            raise NotEmulated("cp.async of a part of its bytes")
        present = given > 0
    if present.any():
        addresses = address_of(machine, source, lanes[present], "u64")
        offsets = machine.global_memory.locate(machine, addresses, size, lanes[present])
        data[present] = machine.global_memory.load(offsets, 4, size // 4)
    addresses = address_of(machine, target, lanes, "u32")
    offsets = machine.shared_memory.locate(machine, addresses, size, lanes)
    machine.copies.start(machine, offsets, data, lanes)


def fence(machine: Machine, i: Instruction, mask: Mask | None) -> None:
    """`fence.proxy.async`: what was written to shared memory before may be read by wgmma."""
    if i.parts[1:3] != ("proxy", "async"):
        raise NotEmulated(i.text)
    machine.products.fence_proxy(machine, machine.lanes_of(mask))


INSTRUCTIONS = {"cp": copy_async, "fence": fence}
