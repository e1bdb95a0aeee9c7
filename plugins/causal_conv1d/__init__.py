"""Depthwise causal convolution with bias and SiLU over packed sequences, its history in a pool."""

from collections.abc import Mapping

from nemotrt.plugins.contract import DType
from nemotrt.plugins.spec import FLOATS, PACKED_AXES, PACKED_INPUTS, OpSpec, TensorSpec, Tolerance
from nemotrt.plugins.variant import check_sm, require_multiple, require_one_of, require_packed

SPEC = OpSpec(
    name="NemoCausalConv1d",
    label="conv",
    summary="Depthwise causal convolution, bias and SiLU over x, B and C of Mamba-2.",
    axes=PACKED_AXES
    | {"C": "channels: x, B and C of the mixer side by side", "K": "taps", "K-1": "taps kept"},
    inputs=(
        TensorSpec("x", ("T", "C"), "X"),
        TensorSpec("weight", ("C", "K"), "X"),
        TensorSpec("bias", ("C",), "X"),
        TensorSpec("conv_state", ("S", "C", "K-1"), "X"),
        *PACKED_INPUTS,
        TensorSpec("slot", ("B",), DType.INT32),
    ),
    outputs=(
        TensorSpec("y", ("T", "C"), "X"),
        TensorSpec("next_conv_state", ("S", "C", "K-1"), "X"),
    ),
    attributes={},
    dtypes={"X": FLOATS},
    tolerances={
        DType.FLOAT32: Tolerance(
            1e-6, "four products and a SiLU in FP32: a few units in the last place (6e-8)"
        ),
        DType.FLOAT16: Tolerance(1e-3, "one rounding of y to 11 bits (4.9e-4 at worst), computed in FP32"),
        DType.BFLOAT16: Tolerance(8e-3, "one rounding of y to 8 bits (3.9e-3 at worst), computed in FP32"),
    },
    package=__name__,
)

FAMILY_TAPS = (2, 3, 4)
"""The numbers of taps that the kernels are compiled for; the published models have 4."""

ALIGNMENT = 16
"""The number of channels is a multiple of this, so that each row is aligned for vector loads."""


def supports(sizes: Mapping[str, int], dtypes: Mapping[str, str], sm: int) -> None:
    """Raise ValueError if no kernel supports a call; the message names the op, the value and the supported values.

    `sizes` are the SPEC's axes by name, `dtypes` its dtype variables.
    """
    check_sm(SPEC.name, sm)
    require_one_of(SPEC.name, "X", dtypes["X"], FLOATS)
    require_one_of(SPEC.name, "K", sizes["K"], FAMILY_TAPS)
    require_multiple(SPEC.name, "C", sizes["C"], ALIGNMENT)
    require_packed(SPEC.name, sizes)
