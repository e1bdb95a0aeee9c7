"""Runs programs: each instruction in turn, branches and barriers.

Threads that take different branches run in the order of their code, and join where they meet.
"""

from __future__ import annotations

import numpy as np

from nemotrt.plugins.emulator import arithmetic, async_copies, conversions, loads, matrices, warpgroups, warps
from nemotrt.plugins.emulator.errors import NotEmulated
from nemotrt.plugins.emulator.machine import Machine
from nemotrt.plugins.emulator.ptx import Instruction, Symbol
from nemotrt.plugins.emulator.registers import Mask

MAX_STEPS = 2_000_000
"""Instructions after which a program counts as endless."""

INSTRUCTIONS: dict[str, arithmetic.Execute] = {
    **arithmetic.INSTRUCTIONS,
    **conversions.INSTRUCTIONS,
    **loads.INSTRUCTIONS,
    **async_copies.INSTRUCTIONS,
    **warps.INSTRUCTIONS,
    **matrices.INSTRUCTIONS,
    **warpgroups.INSTRUCTIONS,
}
"""What executes an opcode, by its first part; branches, barriers and `ret` are below."""


def run(machine: Machine) -> None:
    """Run all threads to their end; raises Fault on the first wrong access, NotEmulated on unknown PTX."""
    waiting: dict[int, Mask] = {0: np.ones(machine.num_lanes, bool)}
    with np.errstate(all="ignore"):
        while waiting:
            start = min(waiting)
            _run_together(machine, start, waiting.pop(start), waiting)


def _run_together(machine: Machine, pc: int, active: Mask, waiting: dict[int, Mask]) -> None:
    """Run threads up to a branch that parts them, or to where others wait."""
    everyone = None if active.all() else active
    limit = min(waiting, default=len(machine.program.instructions))
    while pc < limit:
        machine.instruction = i = machine.program.instructions[pc]
        machine.steps += 1
        if machine.steps > MAX_STEPS:
            raise machine.fault("the program does not end")
        mask = _guarded(machine, i, everyone)
        if i.base in ("bra", "ret"):
            leaving = active if mask is None else mask
            staying = active & ~leaving
            if i.base == "ret":
                machine.alive &= ~leaving
            elif not staying.any():
                pc = _target(machine, i)
                continue
            elif leaving.any():
                _join(waiting, _target(machine, i), leaving)
            if leaving.any():
                _join(waiting, pc + 1, staying)
                return
        elif i.base in ("bar", "barrier"):
            _barrier(machine, i, active if mask is None else mask)
        elif mask is None or mask.any():
            _execute(machine, i, mask)
        pc += 1
    _join(waiting, pc, active)


def _guarded(machine: Machine, i: Instruction, mask: Mask | None) -> Mask | None:
    """The lanes of the mask in which an instruction's guard is true."""
    if i.guard is None:
        return mask
    condition = machine.lanes(i.guard, "pred") ^ i.negated
    return condition if mask is None else mask & condition


def _execute(machine: Machine, i: Instruction, mask: Mask | None) -> None:
    if i.base not in INSTRUCTIONS:
        raise NotEmulated(f"{machine.program.name}, PTX line {i.line}: {i.text}")
    machine.products.check_registers(i, mask)
    try:
        INSTRUCTIONS[i.base](machine, i, None if mask is not None and mask.all() else mask)
    except NotEmulated as error:
        raise NotEmulated(f"{machine.program.name}, PTX line {i.line}: {i.text}: {error}") from error


def _target(machine: Machine, i: Instruction) -> int:
    (label,) = i.operands
    assert isinstance(label, Symbol)
    return machine.program.labels[label.name]


def _barrier(machine: Machine, i: Instruction, mask: Mask) -> None:
    """A barrier of all threads of a block that have not ended."""
    if i.parts[:2] == ("bar", "warp"):
        return
    if i.parts[:2] != ("bar", "sync") or len(i.operands) != 1:
        raise NotEmulated(f"{machine.program.name}, PTX line {i.line}: {i.text}")
    arrived = mask.reshape(-1, machine.num_threads).sum(axis=1)
    expected = machine.alive.reshape(-1, machine.num_threads).sum(axis=1)
    if (partial := (arrived > 0) & (arrived < expected)).any():
        block = int(np.argmax(partial))
        missing = machine.alive & ~mask & (machine.block == block)
        what = f"a barrier that {arrived[block]} of {expected[block]} threads reach, not reached"
        raise machine.fault(what, int(np.argmax(missing)))
    machine.epoch[arrived > 0] += 1


def _join(waiting: dict[int, Mask], pc: int, mask: Mask) -> None:
    if mask.any():
        waiting[pc] = waiting[pc] | mask if pc in waiting else mask.copy()
