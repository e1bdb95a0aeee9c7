"""The sizes and dtypes that the op's kernels support; needs neither Triton, torch nor a GPU."""

from __future__ import annotations

from collections.abc import Mapping

from nemotrt.plugins.contract import DType
from nemotrt.plugins.selective_scan import SPEC
from nemotrt.plugins.variant import check_sm, require, require_multiple, require_one_of, require_packed

STATE_SIZES = (128, 256)
"""The values of N in the published models."""

DTYPES = (
    *((DType.FLOAT16, DType.FLOAT32), (DType.FLOAT16, DType.FLOAT16)),
    *((DType.BFLOAT16, DType.FLOAT32), (DType.BFLOAT16, DType.FLOAT16)),
    (DType.FLOAT32, DType.FLOAT32),
)
"""The dtypes of x and of the pool that the kernels are compiled for."""


def supports(sizes: Mapping[str, int], dtypes: Mapping[str, str], sm: int) -> None:
    """Raise ValueError if no kernel supports a call; the message names the op, the value and the supported values.

    `sizes` are the SPEC's axes by name, `dtypes` its dtype variables.
    """
    check_sm(SPEC.name, sm)
    pairs = [f"({x}, {state})" for x, state in DTYPES]
    require_one_of(SPEC.name, "(X, STATE)", f"({dtypes['X']}, {dtypes['STATE']})", pairs)
    require_one_of(SPEC.name, "N", sizes["N"], STATE_SIZES)
    P, N = sizes["P"], sizes["N"]
    is_supported = P % 32 == 0 or (P, N) == (80, 128)
    require(SPEC.name, "P", f"{P} with N {N}", is_supported, "a multiple of 32, or 80 with N 128")
    require_multiple(SPEC.name, "H", sizes["H"], sizes["G"])
    require_packed(SPEC.name, sizes)
