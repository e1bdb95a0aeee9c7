"""What the op's kernels take: known without Triton, torch or a GPU."""

from __future__ import annotations

from collections.abc import Mapping

from nemotrt.plugins.selective_scan import SPEC
from nemotrt.plugins.variant import check_packed, check_sm

STATE_SIZES = (128, 256)
"""N of the family."""

DTYPES = (
    *(("float16", "float32"), ("float16", "float16")),
    *(("bfloat16", "float32"), ("bfloat16", "float16")),
    ("float32", "float32"),
)
"""Dtypes of x and of the pool that the kernels are compiled for."""


def supports(sizes: Mapping[str, int], dtypes: Mapping[str, str], sm: int) -> None:
    """Raise ValueError, naming the op, what does not fit and what does, where no kernel serves a call.

    `sizes` are the SPEC's axes by name, `dtypes` its dtype variables.
    """
    check_sm(SPEC.name, sm)
    if (dtypes["X"], dtypes["STATE"]) not in DTYPES:
        supported = ", ".join(f"({x}, {state})" for x, state in DTYPES)
        raise ValueError(
            f"{SPEC.name}: kernels take (x, ssm_state) in {supported}, not ({dtypes['X']}, {dtypes['STATE']})"
        )
    if sizes["N"] not in STATE_SIZES:
        raise ValueError(f"{SPEC.name}: kernels take N in {list(STATE_SIZES)}, not {sizes['N']}")
    if not (sizes["P"] % 32 == 0 or (sizes["P"] == 80 and sizes["N"] == 128)):
        raise ValueError(
            f"{SPEC.name}: kernels take P in multiples of 32, or 80 with N 128,"
            f" not {sizes['P']} with N {sizes['N']}"
        )
    if sizes["H"] % sizes["G"]:
        raise ValueError(f"{SPEC.name}: H = {sizes['H']} is no multiple of G = {sizes['G']}")
    check_packed(SPEC.name, sizes)
