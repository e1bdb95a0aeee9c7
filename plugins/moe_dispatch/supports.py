"""The sizes and dtypes that the op's kernels support; needs neither Triton, torch nor a GPU."""

from __future__ import annotations

from collections.abc import Mapping

from nemotrt.plugins.contract import DType
from nemotrt.plugins.moe_dispatch import SPEC
from nemotrt.plugins.spec import FLOATS
from nemotrt.plugins.variant import (
    MAX_INT32,
    check_sm,
    require_multiple,
    require_one_of,
    require_range,
    supports_fp8,
)

FP8 = DType.FLOAT8_E4M3
MAX_EXPERTS = 512
MAX_TOP_K = 32


def supports(sizes: Mapping[str, int], dtypes: Mapping[str, str], sm: int) -> None:
    """Raise ValueError if no kernel supports a call; the message names the op, the value and the supported values.

    `sizes` are the SPEC's axes and attributes by name, `dtypes` its dtype variables.
    """
    check_sm(SPEC.name, sm)
    X, W = dtypes["X"], dtypes["W"]
    if W == FP8 and not supports_fp8(sm):
        raise ValueError(
            f"{SPEC.name}: SM {sm} has no FP8 tensor cores: use fp16 or bf16 weights, or SM 89 or later"
        )
    require_one_of(SPEC.name, "X", X, FLOATS)
    require_one_of(SPEC.name, "W", W, (X, FP8))
    require_multiple(SPEC.name, "L", sizes["L"], 16)
    require_multiple(SPEC.name, "I", sizes["I"], 16)
    R, groups = sizes["R"], sizes["num_groups"]
    require_range(SPEC.name, "R", R, 1, MAX_EXPERTS)
    require_range(SPEC.name, "E", sizes["E"], 1, MAX_EXPERTS)
    require_range(SPEC.name, "top_k", sizes["top_k"], 1, min(MAX_TOP_K, R))
    require_range(SPEC.name, "num_groups", groups, 1, R)
    if R % groups:
        raise ValueError(f"{SPEC.name}: num_groups = {groups} does not divide {R} experts")
    require_range(SPEC.name, "topk_group", sizes["topk_group"], 1, groups)
    require_range(SPEC.name, "first_expert", sizes["first_expert"], 0, MAX_INT32)
