"""The PTX that was compiled for the shipped cubins gives the reference's results, and faults put into it are found."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any

import pytest
import torch

pytest.importorskip("triton", reason="compiling kernels needs Triton: install nemo-export[kernels]")

from emulation import MIXTURE, Compiled, Key, check, launched
from gpu_check import CheckFailed, same_bits
from op_cases import FP8, TOY, Case, prefill
from ptx_faults import ATTENTION, CONV, EXPERT, FAULTS, FP8_CACHE, SCAN, PtxFault

from nemotrt.plugins.build import kernels_with_ptx
from nemotrt.plugins.e4m3 import to_e4m3
from nemotrt.plugins.emulator.errors import Fault, NotEmulated
from nemotrt.plugins.emulator.interception import intercepted
from nemotrt.plugins.emulator.launches import emulate
from nemotrt.plugins.paged_attention import kernels as paged_attention
from nemotrt.plugins.variant import Launch

FP8_EXPERTS = Case("moe_dispatch", TOY, MIXTURE, (("X", "float16"), ("W", FP8)))
CPU = torch.device("cpu")
APPEND = "paged_append"
FP8_KEYS = Case("paged_attention", TOY, prefill(512), (("X", "float16"), ("CACHE", FP8)))
CASES = (
    *((case, 90) for case in (CONV, SCAN, EXPERT, ATTENTION, FP8_EXPERTS)),
    (FP8_CACHE, 89),
    (replace(SCAN, step=MIXTURE), 120),
    (ATTENTION, 80),
)
"""One or two cases for each SM. `make emulate` runs every variant on every form of step."""


@pytest.fixture(scope="module")
def compiled() -> Compiled:
    """The kernels of all cases, from the cache or compiled now."""
    wanted: dict[Key, None] = {}
    for case, sm in [
        *CASES,
        (FP8_CACHE, 90),
        (FP8_KEYS, 89),
        (FP8_KEYS, 90),
        *((fault.case, fault.sm) for fault in FAULTS),
    ]:
        wanted |= launched(case, sm)
    return kernels_with_ptx(wanted)


@pytest.mark.parametrize(("case", "sm"), CASES, ids=lambda value: getattr(value, "title", f"SM {value}"))
def test_the_ptx_gives_the_reference_s_results(case: Case, sm: int, compiled: Compiled) -> None:
    check(case, sm, compiled)


def faulty(fault: PtxFault, compiled: Compiled) -> Iterator[tuple[Key, object]]:
    for key in launched(fault.case, fault.sm):
        kernel, ptx = compiled[key]
        if kernel.variant.kernel == fault.kernel:
            edited = fault.edit(ptx)
            assert edited != ptx
            ptx = edited
        yield key, (kernel, ptx)


@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: f"{fault.kernel}: {fault.title}")
def test_a_fault_in_the_ptx_is_found(fault: PtxFault, compiled: Compiled) -> None:
    with pytest.raises((CheckFailed, Fault, NotEmulated)) as caught:
        check(fault.case, fault.sm, dict(faulty(fault, compiled)))  # type: ignore[arg-type]
    finding = f"{type(caught.value).__name__}: {caught.value}"
    assert re.search(fault.finding, finding), finding


def cache_of(inputs: list[torch.Tensor], case: Case, sm: int, compiled: Compiled) -> torch.Tensor:
    """The FP8 cache after its one kernel that writes it."""

    def start(launch: Launch, values: Mapping[str, Any]) -> None:
        if launch.variant.kernel == APPEND:
            emulate(launch, values, lambda variant: compiled[case.op, sm, variant.name])

    with intercepted(paged_attention, sm, start):
        return paged_attention.run(*inputs, **case.attributes())[1]


@pytest.mark.parametrize("sm", [89, 90])
def test_every_fp16_is_stored_in_fp8_as_pytorch_casts_it(sm: int, compiled: Compiled) -> None:
    """All 65,536 FP16 values as keys: signed zeros, subnormal numbers, infinities and NaN among them."""
    inputs = FP8_KEYS.inputs(CPU, 0)
    _, k, _, _, k_scale, *_, page_table = inputs
    key = torch.arange(-(2**15), 2**15).to(torch.int16).view(torch.float16)
    inputs[1] = key.reshape(k.shape)
    pages = cache_of(inputs, FP8_KEYS, sm, compiled)[
        page_table[0].long(), 0
    ]  # pages, heads, tokens, head dim
    stored = pages.transpose(1, 2).reshape(-1)[: key.numel()].float()
    expected = to_e4m3(key, k_scale).float()
    torch.testing.assert_close(stored, expected, rtol=0, atol=0, equal_nan=True)
    assert torch.equal(stored.signbit() & ~key.isnan(), expected.signbit() & ~key.isnan())


def test_a_cache_has_the_same_bits_on_sm_89_and_90(compiled: Compiled) -> None:
    old, new = (cache_of(FP8_CACHE.inputs(CPU, 3), FP8_CACHE, sm, compiled) for sm in (89, 90))
    assert same_bits(old[1:], new[1:])
