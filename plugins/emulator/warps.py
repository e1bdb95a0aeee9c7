"""Exchanges between the threads of a warp: `shfl` and `redux`."""

from __future__ import annotations

import numpy as np

from nemotrt.plugins.emulator.errors import NotEmulated
from nemotrt.plugins.emulator.machine import Machine
from nemotrt.plugins.emulator.ptx import Instruction
from nemotrt.plugins.emulator.registers import Mask


def check_whole_warps(machine: Machine, mask: Mask | None) -> None:
    """Raise Fault if some threads of a warp do not take part in an instruction of the whole warp."""
    if mask is None:
        return
    warps = mask.reshape(-1, 32)
    if (partial := warps.any(axis=1) & ~warps.all(axis=1)).any():
        lane = 32 * int(np.argmax(partial)) + int(np.argmin(warps[np.argmax(partial)]))
        raise machine.fault("not reached by the whole warp; the first missing is", lane)


def shuffle(machine: Machine, i: Instruction, mask: Mask | None) -> None:
    """`shfl.sync` of all 32 threads of a warp; a lane out of range reads itself."""
    check_whole_warps(machine, mask)
    values = machine.lanes(i.operands[1], "b32").reshape(-1, 32)
    distance = machine.lanes(i.operands[2], "u32").astype(np.int64).reshape(-1, 32) & 31
    clamp = machine.lanes(i.operands[3], "u32").astype(np.int64).reshape(-1, 32)
    lane = np.arange(32)
    segment, last = (clamp >> 8) & 31, clamp & 31
    lowest, highest = lane & segment, (lane & segment) | (last & ~segment)
    if i.parts[2] == "up":
        source = lane - distance
        inside = source >= highest
    else:
        moved = {"bfly": lane ^ distance, "down": lane + distance, "idx": lowest | (distance & ~segment)}
        source = moved[i.parts[2]]
        inside = source <= highest
    source = np.where(inside, source, lane)
    machine.write(i.operands[0], np.take_along_axis(values, source, axis=1).reshape(-1), mask)


REDUCTIONS = {"add": np.add, "min": np.minimum, "max": np.maximum, "and": np.bitwise_and, "or": np.bitwise_or}


def reduce(machine: Machine, i: Instruction, mask: Mask | None) -> None:
    """`redux.sync` over all 32 threads of a warp."""
    check_whole_warps(machine, mask)
    if i.parts[2] not in REDUCTIONS or i.type not in ("s32", "u32", "b32"):
        raise NotEmulated(i.text)
    values = machine.lanes(i.operands[1], i.type).reshape(-1, 32)
    result = REDUCTIONS[i.parts[2]].reduce(values, axis=1)
    machine.write(i.operands[0], np.repeat(result, 32), mask)


INSTRUCTIONS = {"shfl": shuffle, "redux": reduce}
