"""Runs cases of `op_cases` in the PTX emulator; for `emulate.py` and the tests."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from importlib import import_module
from typing import Any

import torch
from gpu_check import Errors, compare, poisoned_memory
from op_cases import DTYPES, TOY, Case, Model, Step, decode, prefill

from nemotrt.plugins.emulator.interception import intercepted
from nemotrt.plugins.emulator.launches import emulate
from nemotrt.plugins.kernel_index import Kernel
from nemotrt.plugins.variant import Launch, supports_fp8

Wanted = dict[tuple[str, int, str], None]

SMS = (80, 89, 90, 120)
"""The GPU generations whose PTX the emulator executes."""

STEPS = (
    prefill(100),
    decode(3, 70),
    Step("mixture", (1, 0, 37, 1, 70), (70, 7, 0, 3, 64), padding=2),
    Step("padded decode", (1, 0, 1), (66, 3, 0), padding=1),
)
"""Each form of a step: prefill, decode, both with a sequence without tokens and padding, and a padded decode."""


def cases(sm: int) -> Iterable[Case]:
    """Every op with every combination of dtypes that the SM supports, on each step."""
    for op, combinations in DTYPES.items():
        for dtypes in combinations:
            for step in STEPS:
                case = Case(op, TOY, step, tuple(dtypes.items()))
                if supports_fp8(sm) or not case.needs_fp8:
                    yield case


def variants(case: Case, sm: int) -> Wanted:
    """The variants that a case launches, each as its op, its SM and its name."""
    wanted: Wanted = {}
    kernels = import_module(f"nemotrt.plugins.{case.op}.kernels")
    with intercepted(kernels, sm, lambda launch, _: wanted.update({(case.op, sm, launch.variant.name): None})):
        kernels.run(*case.inputs(torch.device("cpu"), 0), **case.attributes())
    return wanted


def run(case: Case, sm: int, compiled: Mapping[tuple[str, int, str], tuple[Kernel, str]], seed: int) -> Errors:
    """Run a case's PTX; the errors of its outputs. Raises CheckFailed, Fault or NotEmulated."""
    kernels = import_module(f"nemotrt.plugins.{case.op}.kernels")
    inputs = case.inputs(torch.device("cpu"), seed)

    def start(launch: Launch, values: Mapping[str, Any]) -> None:
        emulate(launch, values, lambda variant: compiled[case.op, sm, variant.name])

    with poisoned_memory(), intercepted(kernels, sm, start):
        outputs = kernels.run(*inputs, **case.attributes())
    return compare(case, inputs, outputs, outputs)
