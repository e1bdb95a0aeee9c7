"""What the emulator reports: a fault of the kernel, or PTX that it does not execute."""

from __future__ import annotations

from dataclasses import dataclass


class NotEmulated(Exception):  # noqa: N818 - not a fault of the kernel
    """The PTX uses an instruction, an operand or a form that the emulator does not execute."""


@dataclass
class Fault(Exception):  # noqa: N818 - a finding
    """An access or a barrier that is wrong on a GPU, with its place."""

    what: str
    kernel: str
    line: int
    """The line in the PTX."""
    text: str
    """The instruction in that line."""
    source: str = ""
    """The line of the Triton kernel, if the PTX has line information."""
    program: tuple[int, int, int] | None = None
    """The program in the grid."""
    thread: int | None = None
    address: str = ""

    def __str__(self) -> str:
        """One line: what, where and which thread."""
        place = f"{self.kernel}, PTX line {self.line}" + (f" ({self.source})" if self.source else "")
        parts = [f"{place}: {self.what}"]
        if self.address:
            parts.append(f"at {self.address}")
        if self.thread is not None:
            parts.append(f"by thread {self.thread} of program {self.program}")
        return f"{' '.join(parts)}: {self.text}"
