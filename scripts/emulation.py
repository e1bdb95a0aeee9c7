"""Cases of `op_cases` for the PTX emulator, small but with every form of step and every variant, and how to run one."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from importlib import import_module
from typing import Any

import torch
from gpu_check import WORST_ROW, CheckFailed, Errors, compare, poisoned_memory
from op_cases import DTYPES, TOY, Case, Step, decode, prefill

from nemotrt.plugins.build import packages
from nemotrt.plugins.emulator.interception import intercepted
from nemotrt.plugins.emulator.launches import emulate
from nemotrt.plugins.kernel_index import Kernel
from nemotrt.plugins.variant import Launch, Variant, supports_fp8

SMS = (80, 86, 89, 90, 120)
"""The GPU generations whose PTX the emulator executes."""

Key = tuple[str, int, str]
"""An op, an SM and the name of a variant."""

Compiled = Mapping[Key, tuple[Kernel, str]]
"""Kernels with their PTX, which `build.kernels_with_ptx` returns."""

MIXTURE = Step("mixture", (1, 0, 37, 1, 70), (70, 7, 0, 3, 64), padding=2)
STEPS = (prefill(100), decode(3, 70), MIXTURE, Step("padded decode", (1, 0, 1), (66, 3, 0), padding=1))
"""Each form of a step: prefill, decode, both with a sequence without tokens and with padding, and a padded decode."""

MID = replace(TOY, name="mid", heads=4, groups=2, query_heads=8, kv_heads=2, attention_dim=128)
MANY_EXPERTS = replace(TOY, name="many experts", experts=136, top_k=9)
EXPERTS = replace(TOY, name="experts", experts=4, expert_input=320, inner=528)
WIDE_EXPERTS = replace(EXPERTS, name="wide experts", expert_input=256, inner=256)

VARIED = {
    "causal_conv1d": [
        *((replace(TOY, name=f"{taps} taps", taps=taps), MIXTURE) for taps in (2, 3)),
    ],
    "selective_scan": [
        (replace(TOY, name="state 256", state=256), MIXTURE),
        (replace(TOY, name="heads of 80", head_dim=80), MIXTURE),
        (replace(TOY, name="heads of 80", head_dim=80), decode(2, 9)),
        (replace(TOY, name="96 heads", heads=96), prefill(70)),
    ],
    "paged_attention": [(MID, MIXTURE), (MID, decode(2, 150))],
    "moe_dispatch": [
        (EXPERTS, decode(1, 0)),
        (EXPERTS, prefill(90)),
        (EXPERTS, prefill(290)),
        (WIDE_EXPERTS, prefill(290)),
        (MANY_EXPERTS, decode(1, 0)),
        (MANY_EXPERTS, prefill(70)),
        (replace(MANY_EXPERTS, top_k=2), prefill(520)),
    ],
}
"""Models and steps that make an op launch the variants that the toy model does not."""


def cases(sm: int) -> Iterator[Case]:
    """Every op with every combination of dtypes that the SM supports, on each form of step and on varied models."""
    for op, combinations in DTYPES.items():
        for model, step in [*((TOY, step) for step in STEPS), *VARIED[op]]:
            for dtypes in combinations:
                case = Case(op, model, step, tuple(dtypes.items()))
                if supports_fp8(sm) or not case.needs_fp8:
                    yield case


def launched(case: Case, sm: int) -> dict[Key, None]:
    """The variants that a case launches, in order."""
    found: dict[Key, None] = {}

    def start(launch: Launch, values: Mapping[str, Any]) -> None:
        found[case.op, sm, launch.variant.name] = None

    kernels = import_module(f"nemotrt.plugins.{case.op}.kernels")
    with intercepted(kernels, sm, start):
        kernels.run(*case.inputs(torch.device("cpu"), 0), **case.attributes())
    return found


def num_variants(op: str, sm: int) -> int:
    """The number of an op's variants on an SM."""
    return len(list(import_module(f"{packages()[op]}.kernels").variants(sm)))


def tolerance(case: Case) -> float:
    """The largest allowed relative L2 error."""
    return max(case.spec.tolerances[dtype].relative_l2 for dtype in case.dtype.values())


def outputs(
    case: Case, sm: int, kernel_of: Callable[[Variant], tuple[Kernel, str]], seed: int
) -> tuple[list[torch.Tensor], tuple[torch.Tensor, ...]]:
    """A case's inputs, and its outputs by the PTX; raises Fault or NotEmulated."""
    kernels = import_module(f"nemotrt.plugins.{case.op}.kernels")
    inputs = case.inputs(torch.device("cpu"), seed)
    with (
        poisoned_memory(),
        intercepted(kernels, sm, lambda launch, values: emulate(launch, values, kernel_of)),
    ):
        return inputs, kernels.run(*inputs, **case.attributes())


def check(case: Case, sm: int, compiled: Compiled, seed: int = 1) -> Errors:
    """Run a case's PTX and compare; returns the errors. Raises CheckFailed, Fault or NotEmulated."""
    inputs, computed = outputs(case, sm, lambda variant: compiled[case.op, sm, variant.name], seed)
    errors = compare(case, inputs, computed, computed)
    if not errors[0] <= tolerance(case) or not errors[1] <= WORST_ROW * tolerance(case):
        raise CheckFailed(f"the error {errors[0]:.1e}, of a row {errors[1]:.1e}, is beyond the tolerance")
    return errors
