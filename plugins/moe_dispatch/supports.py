"""What the op's kernels take: known without Triton, torch or a GPU."""

from __future__ import annotations

from collections.abc import Mapping

from nemotrt.plugins.moe_dispatch import SPEC
from nemotrt.plugins.spec import FLOATS
from nemotrt.plugins.variant import check_sm, supports_fp8

FP8 = "float8_e4m3fn"
MAX_EXPERTS = 512
MAX_TOP_K = 32


def supports(sizes: Mapping[str, int], dtypes: Mapping[str, str], sm: int) -> None:
    """Raise ValueError, naming the op, what does not fit and what does, where no kernel serves a call.

    `sizes` are the SPEC's axes and attributes by name, `dtypes` its dtype variables.
    """
    check_sm(SPEC.name, sm)
    X, W = dtypes["X"], dtypes["W"]
    if W == FP8 and not supports_fp8(sm):
        raise ValueError(
            f"{SPEC.name}: SM {sm} has no FP8 tensor cores: use fp16 or bf16 weights, or SM 89 or later"
        )
    if X not in FLOATS or W not in (X, FP8):
        raise ValueError(
            f"{SPEC.name}: x in {X} with weights in {W}; x is one of {', '.join(FLOATS)},"
            f" weights are in x's dtype or in {FP8}"
        )
    if sizes["L"] % 16 or sizes["I"] % 16:
        raise ValueError(f"{SPEC.name}: L = {sizes['L']}, I = {sizes['I']}; both must be multiples of 16")
    if max(sizes["R"], sizes["E"]) > MAX_EXPERTS:
        raise ValueError(f"{SPEC.name}: R = {sizes['R']}, E = {sizes['E']}; at most {MAX_EXPERTS} experts")
    _check_routing(sizes)


def _check_routing(sizes: Mapping[str, int]) -> None:
    R, groups = sizes["R"], sizes["num_groups"]
    most = min(MAX_TOP_K, R)
    if not 1 <= sizes["top_k"] <= most:
        raise ValueError(f"{SPEC.name}: top_k = {sizes['top_k']}; from 1 to {most} of {R} experts")
    if groups < 1 or R % groups:
        raise ValueError(f"{SPEC.name}: num_groups = {groups} does not divide {R} experts")
    if not 1 <= sizes["topk_group"] <= groups:
        raise ValueError(f"{SPEC.name}: topk_group = {sizes['topk_group']}; from 1 to {groups} groups")
    if sizes["first_expert"] < 0:
        raise ValueError(f"{SPEC.name}: first_expert = {sizes['first_expert']}; at least 0")
