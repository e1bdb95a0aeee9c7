"""Several programs of a grid, run together: every thread is a lane of NumPy arrays.

Threads that take different branches run in the order of their code, and join where they meet.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from nemotrt.plugins.emulator import arithmetic, async_copies, conversions, matrices, memory, warpgroups, warps
from nemotrt.plugins.emulator.async_copies import Copies
from nemotrt.plugins.emulator.errors import Fault, NotEmulated
from nemotrt.plugins.emulator.memory import GlobalMemory, SharedMemory
from nemotrt.plugins.emulator.ptx import Instruction, Operand, Program, Symbol
from nemotrt.plugins.emulator.registers import Array, Mask, Registers
from nemotrt.plugins.emulator.warpgroups import Products

MAX_STEPS = 2_000_000
"""Instructions after which a program counts as endless."""

INSTRUCTIONS: dict[str, arithmetic.Execute] = {
    **arithmetic.INSTRUCTIONS,
    **conversions.INSTRUCTIONS,
    **memory.INSTRUCTIONS,
    **async_copies.INSTRUCTIONS,
    **warps.INSTRUCTIONS,
    **matrices.INSTRUCTIONS,
    **warpgroups.INSTRUCTIONS,
}
"""What executes an opcode, by its first part; branches, barriers and `ret` are the machine's own."""


class Machine:
    """The state of some programs of a grid."""

    def __init__(
        self,
        program: Program,
        arguments: Mapping[str, int],
        global_memory: GlobalMemory,
        shared_bytes: int,
        grid: tuple[int, int, int],
        programs: Array,
    ) -> None:
        """`arguments` has the bits of each parameter; `programs` [blocks, 3] are the indices in the grid."""
        self.program = program
        self.arguments = arguments
        self.global_memory = global_memory
        self.programs = programs
        self.num_threads = program.num_threads
        num_blocks = len(programs)
        self.num_lanes = num_blocks * self.num_threads
        lane = np.arange(self.num_lanes)
        self.thread = lane % self.num_threads
        self.block = lane // self.num_threads
        self.warp = lane // 32
        self.epoch = np.zeros(num_blocks, np.int64)
        """Barriers that each block has passed."""
        self.steps = 0
        self.instruction: Instruction = program.instructions[0]
        self.shared_memory = SharedMemory(shared_bytes, num_blocks, memory.granule_of(program))
        self.registers = Registers(program, self._special(grid), self.num_lanes)
        self.copies = Copies(self.num_lanes)
        self.products = Products(self.num_lanes // 128)
        self._alive = np.ones(self.num_lanes, bool)

    def _special(self, grid: tuple[int, int, int]) -> dict[str, Array]:
        zeros = np.zeros(self.num_lanes, np.uint32)
        threads = self.thread.astype(np.uint32)
        values = {"%tid.x": threads, "%tid.y": zeros, "%tid.z": zeros, "%laneid": threads % np.uint32(32)}
        for axis, name in enumerate("xyz"):
            values[f"%ctaid.{name}"] = self.programs[self.block, axis].astype(np.uint32)
            values[f"%nctaid.{name}"] = zeros + np.uint32(grid[axis])
        return values

    def read(self, operand: Operand, kind: str) -> Array:
        """An operand as a PTX type: an array of all lanes, or of one element for a constant."""
        return self.registers.read(operand, kind)

    def lanes(self, operand: Operand, kind: str) -> Array:
        """An operand as a PTX type, always an array of all lanes."""
        return self.registers.lanes(operand, kind)

    def write(self, operand: Operand, values: Array, mask: Mask | None) -> None:
        """Set a register in the lanes of the mask."""
        self.registers.write(operand, values, mask)

    def write_lanes(self, operand: Operand, values: Array, lanes: Array, mask: Mask | None) -> None:
        """Set a register in these lanes, which are the mask's."""
        if mask is None:
            self.registers.write(operand, values, None)
            return
        everywhere = np.zeros(self.num_lanes, values.dtype)
        everywhere[lanes] = values
        self.registers.write(operand, everywhere, mask)

    def lanes_of(self, mask: Mask | None) -> Array:
        """The indices of the mask's lanes."""
        return np.arange(self.num_lanes) if mask is None else np.flatnonzero(mask)

    def fault(self, what: str, lane: int | None = None, address: str = "") -> Fault:
        """A fault of the current instruction."""
        i, program, thread = self.instruction, None, None
        if lane is not None:
            x, y, z = self.programs[self.block[lane]]
            program, thread = (int(x), int(y), int(z)), int(self.thread[lane])
        return Fault(what, self.program.name, i.line, i.text, i.source, program, thread, address)

    def run(self) -> None:
        """Run all threads to their end; raises Fault on the first wrong access, NotEmulated on unknown PTX."""
        waiting: dict[int, Mask] = {0: np.ones(self.num_lanes, bool)}
        with np.errstate(all="ignore"):
            while waiting:
                start = min(waiting)
                active = waiting.pop(start)
                self._run_together(start, active, waiting)

    def _run_together(self, pc: int, active: Mask, waiting: dict[int, Mask]) -> None:
        """Run threads up to a branch that parts them, or to where others wait."""
        everyone = bool(active.all())
        limit = min(waiting, default=len(self.program.instructions))
        while pc < limit:
            self.instruction = i = self.program.instructions[pc]
            self.steps += 1
            if self.steps > MAX_STEPS:
                raise self.fault("the program does not end")
            mask = None if everyone else active
            if i.guard is not None:
                condition = self.lanes(i.guard, "pred") ^ i.negated
                mask = condition if mask is None else mask & condition
            if i.base == "bra":
                taken = active if mask is None else mask
                target = self._target(i)
                if taken.all() if everyone else (taken == active).all():
                    pc = target
                    continue
                if taken.any():
                    _join(waiting, target, taken)
                    active = active & ~taken
                    _join(waiting, pc + 1, active)
                    return
            elif i.base == "ret":
                ending = active if mask is None else mask
                self._alive &= ~ending
                if (active & ~ending).any():
                    _join(waiting, pc + 1, active & ~ending)
                return
            elif i.base in ("bar", "barrier"):
                self._barrier(i, active if mask is None else mask)
            elif mask is None or mask.any():
                self._execute(i, mask)
            pc += 1
        _join(waiting, pc, active)

    def _execute(self, i: Instruction, mask: Mask | None) -> None:
        execute = INSTRUCTIONS.get(i.base)
        if execute is None:
            raise NotEmulated(f"{self.program.name}, PTX line {i.line}: {i.text}")
        self.products.check_registers(self, i, mask)
        try:
            execute(self, i, None if mask is not None and mask.all() else mask)
        except NotEmulated as error:
            raise NotEmulated(f"{self.program.name}, PTX line {i.line}: {i.text}: {error}") from error

    def _target(self, i: Instruction) -> int:
        (label,) = i.operands
        assert isinstance(label, Symbol)
        return self.program.labels[label.name]

    def _barrier(self, i: Instruction, mask: Mask) -> None:
        """A barrier of all threads of a block that have not ended."""
        if i.parts[:2] == ("bar", "warp"):
            return
        if i.parts[:2] != ("bar", "sync") or len(i.operands) != 1:
            raise NotEmulated(i.text)
        arrived = mask.reshape(-1, self.num_threads).sum(axis=1)
        expected = self._alive.reshape(-1, self.num_threads).sum(axis=1)
        if (partial := (arrived > 0) & (arrived < expected)).any():
            block = int(np.argmax(partial))
            missing = self._alive & ~mask & (self.block == block)
            what = f"a barrier that {arrived[block]} of {expected[block]} threads reach; the first missing"
            raise self.fault(what, int(np.argmax(missing)))
        self.epoch[arrived > 0] += 1


def _join(waiting: dict[int, Mask], pc: int, mask: Mask) -> None:
    waiting[pc] = waiting[pc] | mask if pc in waiting else mask.copy()
