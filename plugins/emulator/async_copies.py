"""`cp.async` from global to shared memory with its groups, and proxy fences.

A copy's data arrives when its thread waits for its group, and no earlier. Bulk copies (TMA) and mbarriers are not
emulated.
"""

from __future__ import annotations

import numpy as np

from nemotrt.plugins.emulator.errors import NotEmulated
from nemotrt.plugins.emulator.loads import address_of
from nemotrt.plugins.emulator.machine import Machine
from nemotrt.plugins.emulator.ptx import Immediate, Instruction
from nemotrt.plugins.emulator.registers import Mask


def copy_async(machine: Machine, i: Instruction, mask: Mask | None) -> None:
    """`cp.async` of 4, 8 or 16 bytes, of which the source has all or none, and its groups."""
    lanes = machine.lanes_of(mask)
    if i.parts[2:] == ("commit_group",):
        machine.copies.commit(lanes)
        return
    if i.parts[2:] == ("wait_group",):
        (count,) = i.operands
        assert isinstance(count, Immediate)
        machine.copies.wait(lanes, count.bits)
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
    machine.copies.start(offsets, data, lanes)


def fence(machine: Machine, i: Instruction, mask: Mask | None) -> None:
    """`fence.proxy.async`: what was written to shared memory before may be read by wgmma."""
    if i.parts[1:3] != ("proxy", "async"):
        raise NotEmulated(i.text)
    machine.products.fence_proxy(machine.lanes_of(mask))


INSTRUCTIONS = {"cp": copy_async, "fence": fence}
