"""The kernels of a folder of cubins, `sm90/<op>/<variant>.cubin`, with what a launch needs.

A launch passes the variant's parameters in order, then `hidden_pointers` null pointers, with 32 · num_warps threads
per block and `shared` bytes of dynamic shared memory.
"""

from dataclasses import dataclass
from pathlib import Path

from nemotrt.plugins.kernel_store import digest
from nemotrt.plugins.variant import Variant


class KernelError(ValueError):
    """Kernels cannot be compiled, linked or found; the message is one line that says what to do."""


@dataclass(frozen=True)
class Kernel:
    """A variant compiled for one SM: how to launch it, and the resources it uses."""

    op: str
    """The op's folder: `selective_scan`."""
    sm: int
    variant: Variant
    file: str
    """Path of the cubin, relative to the index."""
    sha256: str
    num_bytes: int
    entry: str
    """Name of the function in the cubin."""
    target: str
    """The assembler's target: `sm_90a` runs on compute capability 9.0 only, `sm_80` on any 8.x."""
    hidden_pointers: int
    """Number of null pointers to pass after the parameters."""
    shared: int
    """Dynamic shared memory per block, in bytes."""
    registers: int
    """Registers per thread."""
    stack: int
    """Local memory per thread in bytes, including spilled registers."""
    spill_stores: int
    """Bytes of registers that a thread writes to local memory, as counted by the assembler."""
    spill_loads: int
    key: str = ""
    """Hash of everything it was compiled from: source, variant, SM, compiler."""


@dataclass(frozen=True)
class KernelIndex:
    """The kernels in one folder, ordered by SM, op and variant."""

    folder: Path
    triton: str
    """The version of Triton that compiled them."""
    kernels: tuple[Kernel, ...]

    def cubin(self, kernel: Kernel) -> bytes:
        """A kernel's cubin; raises KernelError if the file is missing or has changed."""
        path = self.folder / kernel.file
        try:
            cubin = path.read_bytes()
        except FileNotFoundError:
            raise KernelError(f"{path} is missing: compile the kernels again") from None
        if digest(cubin) != kernel.sha256:
            raise KernelError(f"{path} has changed since it was compiled: compile the kernels again")
        return cubin
