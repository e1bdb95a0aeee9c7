"""Mamba-2's selective scan over packed sequences, its state in a pool."""

from collections.abc import Mapping

from nemotrt.plugins.contract import DType
from nemotrt.plugins.spec import FLOATS, PACKED_AXES, PACKED_INPUTS, OpSpec, TensorSpec, Tolerance
from nemotrt.plugins.variant import check_sm, require, require_multiple, require_one_of, require_packed

SPEC = OpSpec(
    name="NemoSelectiveScan",
    label="scan",
    summary="Softplus, state-space duality over chunks or one recurrence step, and the D skip of Mamba-2.",
    axes=PACKED_AXES
    | {"H": "heads", "P": "head dim", "G": "groups of heads that share B and C", "N": "state size"},
    inputs=(
        TensorSpec("x", ("T", "H", "P"), "X"),
        TensorSpec("dt", ("T", "H"), "X"),
        TensorSpec("A", ("H",), DType.FLOAT32),
        TensorSpec("B", ("T", "G", "N"), "X"),
        TensorSpec("C", ("T", "G", "N"), "X"),
        TensorSpec("D", ("H",), DType.FLOAT32),
        TensorSpec("dt_bias", ("H",), DType.FLOAT32),
        TensorSpec("ssm_state", ("S", "H", "P", "N"), "STATE"),
        *PACKED_INPUTS,
        TensorSpec("slot", ("B",), DType.INT32),
    ),
    outputs=(
        TensorSpec("y", ("T", "H", "P"), "X"),
        TensorSpec("next_ssm_state", ("S", "H", "P", "N"), "STATE"),
    ),
    attributes={"dt_min": float, "dt_max": float},
    dtypes={"X": FLOATS, "STATE": (DType.FLOAT32, DType.FLOAT16)},
    tolerances={
        DType.FLOAT32: Tolerance(
            1e-5, "chunked against sequential sums of up to a few hundred FP32 terms, exp included"
        ),
        DType.FLOAT16: Tolerance(
            2e-3, "FP16 factors into FP32 accumulators and one rounding of y (4.9e-4 each)"
        ),
        DType.BFLOAT16: Tolerance(
            1.6e-2, "BF16 factors into FP32 accumulators and one rounding of y (3.9e-3 each)"
        ),
    },
    package=__name__,
)

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
