"""Runs an op's launches in the emulator, on CPU tensors that they change."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import cache
from typing import Any

import numpy as np
import torch

from nemotrt.plugins.emulator.errors import NotEmulated
from nemotrt.plugins.emulator.execution import run
from nemotrt.plugins.emulator.loads import granule_of
from nemotrt.plugins.emulator.machine import Machine
from nemotrt.plugins.emulator.memory import Buffer, GlobalMemory, SharedMemory
from nemotrt.plugins.emulator.ptx import Program, parse
from nemotrt.plugins.kernel_index import Kernel
from nemotrt.plugins.variant import Launch, Variant

MAX_LANES = 2048
"""Threads of a grid that run together; more take longer for each instruction than they save."""

ALIGNMENT = 16
"""What a variant promises for the parameters in `aligned`."""

Compiled = Callable[[Variant], tuple[Kernel, str]]
"""Returns a variant's kernel and its PTX."""

parsed = cache(parse)


def emulate(launch: Launch, values: Mapping[str, Any], compiled: Compiled) -> None:
    """Run a launch on tensors and attributes by name; raises Fault, or NotEmulated."""
    variant = launch.variant
    kernel, ptx = compiled(variant)
    program = parsed(ptx)
    buffers: dict[str, Buffer] = {}
    numbers: dict[str, Any] = {}
    for name, kind in variant.signature.items():
        value: Any = (
            launch.integers[name] if name in launch.integers else values[launch.renamed.get(name, name)]
        )
        if kind.startswith("*"):
            alignment = ALIGNMENT if name in variant.aligned else value.element_size()
            buffers[name] = Buffer(_bytes(value), alignment)
        else:
            numbers[name] = _bits(value, kind)
    memory = GlobalMemory(_without_aliases(buffers))
    places = {name: memory.address[_first_alias(name, buffers)] for name in buffers}
    given = [places[name] if name in places else numbers[name] for name in variant.signature]
    given += [0] * kernel.hidden_pointers
    arguments = dict(zip(program.parameters, given, strict=True))
    run_grid(program, arguments, memory, kernel.shared, launch.grid)
    memory.copy_back()


def run_grid(
    program: Program,
    arguments: Mapping[str, int],
    memory: GlobalMemory,
    shared_bytes: int,
    grid: tuple[int, int, int],
) -> None:
    """Run every program of a grid, several at a time."""
    x, y, z = (axis.reshape(-1) for axis in np.indices(grid))
    programs = np.stack([x, y, z], axis=1)
    if program.num_threads % 32:
        raise NotEmulated(f"{program.num_threads} threads, which are not whole warps")
    together = max(1, MAX_LANES // program.num_threads)
    for first in range(0, len(programs), together):
        part = programs[first : first + together]
        shared_memory = SharedMemory(shared_bytes, len(part), granule_of(program))
        run(Machine(program, arguments, memory, shared_memory, grid, part))


def _bytes(tensor: torch.Tensor) -> np.ndarray[Any, np.dtype[np.uint8]]:
    """The tensor's own memory."""
    return tensor.reshape(-1).view(torch.uint8).numpy()


def _bits(value: float, kind: str) -> int:
    if kind == "fp32":
        return int(np.float32(value).view(np.uint32))
    return int(value) & ((1 << int(kind.removeprefix("i"))) - 1)


def _first_alias(name: str, buffers: Mapping[str, Buffer]) -> str:
    """The first parameter with the same memory."""
    start = buffers[name].content.ctypes.data
    return next(other for other, buffer in buffers.items() if buffer.content.ctypes.data == start)


def _without_aliases(buffers: Mapping[str, Buffer]) -> dict[str, Buffer]:
    """The buffers, each memory once."""
    return {name: buffer for name, buffer in buffers.items() if _first_alias(name, buffers) == name}
