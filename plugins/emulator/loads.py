"""`ld` and `st`: parameters, global memory and shared memory."""

from __future__ import annotations

import numpy as np

from nemotrt.plugins.emulator.errors import NotEmulated
from nemotrt.plugins.emulator.machine import Machine
from nemotrt.plugins.emulator.ptx import Address, Instruction, Program, Symbol
from nemotrt.plugins.emulator.registers import Array, Mask, dtype_of, elements

CACHE_HINTS = {"nc", "L1", "L2", "evict_last", "evict_first", "no_allocate", "relaxed", "cta"}
"""Modifiers that change no result."""


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
