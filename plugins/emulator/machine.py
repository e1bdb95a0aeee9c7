"""The state of some programs of a grid: their threads, memory, and what is in flight."""

from __future__ import annotations

from collections.abc import Mapping

from nemotrt.plugins.emulator.in_flight import Copies, Products
from nemotrt.plugins.emulator.memory import GlobalMemory, SharedMemory
from nemotrt.plugins.emulator.ptx import Program
from nemotrt.plugins.emulator.registers import Array
from nemotrt.plugins.emulator.threads import Threads


class Machine(Threads):
    """What an instruction reads and changes."""

    def __init__(
        self,
        program: Program,
        arguments: Mapping[str, int],
        global_memory: GlobalMemory,
        shared_memory: SharedMemory,
        grid: tuple[int, int, int],
        programs: Array,
    ) -> None:
        """`arguments` has the bits of each parameter; `programs` [blocks, 3] are the indices in the grid."""
        super().__init__(program, grid, programs)
        self.arguments = arguments
        self.global_memory = global_memory
        self.shared_memory = shared_memory
        self.copies = Copies(self, shared_memory)
        self.products = Products(self, shared_memory)
