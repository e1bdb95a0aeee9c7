"""The threads of several programs of a grid, run together: every thread is a lane of NumPy arrays."""

from __future__ import annotations

import numpy as np

from nemotrt.plugins.emulator.errors import Fault
from nemotrt.plugins.emulator.ptx import Instruction, Operand, Program
from nemotrt.plugins.emulator.registers import Array, Mask, Registers


class Threads:
    """The threads, their registers, and where they are."""

    def __init__(self, program: Program, grid: tuple[int, int, int], programs: Array) -> None:
        """`programs` [blocks, 3] are the indices in the grid."""
        self.program = program
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
        self.registers = Registers(program, self._special(grid), self.num_lanes)
        self.alive = np.ones(self.num_lanes, bool)
        """The threads that have not ended."""

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
