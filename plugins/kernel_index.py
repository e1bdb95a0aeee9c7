"""What a folder of compiled kernels holds: `kernels.json`, and a cubin for each of its entries.

    kernels.json
    sm90/<op>/<variant>.cubin

A launch takes the entry's parameters in order, then `hidden_pointers` null pointers, with 32 · num_warps
threads a block and `shared` bytes of dynamic shared memory. Reading the index needs neither Triton nor torch.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

INDEX_NAME = "kernels.json"
SCHEMA = 1
"""Of kernels.json; a change that an old reader would misread raises it."""


class KernelError(ValueError):
    """Kernels cannot be compiled or found: one line that says what, which, and the way out."""


@dataclass(frozen=True)
class Parameter:
    """One launch parameter: its name in the kernel, its type as Triton writes it (`*fp16`, `i32`, `fp32`)."""

    name: str
    type: str
    aligned: bool
    """The launcher promises a multiple of 16: of the address for a pointer, of the value for an integer."""


@dataclass(frozen=True)
class Kernel:
    """One variant, compiled for one SM: what the host needs to launch it, and what it costs."""

    op: str
    """The op's folder: `selective_scan`."""
    sm: int
    variant: str
    """`Variant.name`: unique in its op and SM."""
    kernel: str
    """The function in the op's kernels.py."""
    file: str
    """The cubin, relative to the index."""
    sha256: str
    num_bytes: int
    entry: str
    """The function's name in the cubin."""
    target: str
    """What it was assembled for: `sm_90a` runs on compute capability 9.0 alone, `sm_80` on any 8.x."""
    parameters: tuple[Parameter, ...]
    hidden_pointers: int
    """Null pointers to pass after the parameters."""
    constants: dict[str, int | float | bool | str]
    num_warps: int
    num_stages: int
    shared: int
    """Dynamic shared memory of a block in bytes, to pass at launch."""
    registers: int
    """Of a thread."""
    stack: int
    """Local memory of a thread in bytes, spilled registers included."""
    spill_stores: int
    """Bytes of registers that a thread's code writes to local memory, as the assembler counts them."""
    spill_loads: int
    key: str = ""
    """Hash of what it was compiled from: source, variant, SM, compiler."""


@dataclass(frozen=True)
class KernelIndex:
    """The kernels of one folder, ordered by SM, op and variant."""

    folder: Path
    triton: str
    """The version of Triton that compiled them."""
    kernels: tuple[Kernel, ...]

    @classmethod
    def load(cls, folder: Path) -> KernelIndex:
        """The index of a folder that `nemotrt.plugins.build` wrote; raises KernelError where it is none."""
        path = folder / INDEX_NAME
        try:
            content = json.loads(path.read_text(encoding="utf-8"))
        except FileNotFoundError:
            raise KernelError(
                f"{folder} has no {INDEX_NAME}: run python -m nemotrt.plugins.build --output {folder}"
            ) from None
        except json.JSONDecodeError as error:
            raise KernelError(f"{path} is not JSON ({error}): compile the kernels again") from None
        schema = content.get("schema") if isinstance(content, dict) else None
        if schema != SCHEMA:
            raise KernelError(f"{path} has schema {schema}, wanted {SCHEMA}: compile the kernels again")
        try:
            kernels = tuple(kernel_of(entry) for entry in content["kernels"])
            return cls(folder, content["triton"], kernels)
        except (KeyError, TypeError) as error:
            raise KernelError(f"{path} lacks or adds a field ({error}): compile the kernels again") from None

    def find(self, op: str, sm: int, variant: str) -> Kernel:
        """The kernel of an op, SM and `Variant.name`; raises KernelError that says what there is instead."""
        for kernel in self.kernels:
            if (kernel.op, kernel.sm, kernel.variant) == (op, sm, variant):
                return kernel
        ops = sorted({kernel.op for kernel in self.kernels})
        sms = sorted({kernel.sm for kernel in self.kernels if kernel.op == op})
        if op not in ops:
            raise KernelError(f"{self.folder} has no kernels of op {op}; it has {', '.join(ops)}")
        if sm not in sms:
            raise KernelError(
                f"{self.folder} has no kernels of {op} for SM {sm}; it has SM {', '.join(map(str, sms))}"
            )
        raise KernelError(
            f"{self.folder} has no variant {variant} of {op} for SM {sm}: compile it, or more dtypes"
        )

    def cubin(self, kernel: Kernel) -> bytes:
        """A kernel's cubin; raises KernelError where the file is missing or not the one compiled."""
        path = self.folder / kernel.file
        try:
            cubin = path.read_bytes()
        except FileNotFoundError:
            raise KernelError(f"{path} is missing: compile the kernels again") from None
        if hashlib.sha256(cubin).hexdigest() != kernel.sha256:
            raise KernelError(f"{path} has changed since it was compiled: compile the kernels again")
        return cubin

    def save(self) -> None:
        """Write kernels.json into the folder, a line a kernel."""
        kernels = ",\n".join(json.dumps(asdict(kernel)) for kernel in self.kernels)
        head = f'{{"schema": {SCHEMA}, "triton": {json.dumps(self.triton)}, "kernels": ['
        (self.folder / INDEX_NAME).write_text(f"{head}\n{kernels}\n]}}\n", encoding="utf-8")


def kernel_of(entry: dict[str, Any]) -> Kernel:
    """An entry of kernels.json as a Kernel; raises TypeError or KeyError where its fields are not those."""
    parameters = tuple(Parameter(**parameter) for parameter in entry["parameters"])
    return Kernel(**entry | {"parameters": parameters})
