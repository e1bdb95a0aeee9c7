"""Depthwise causal convolution with bias and SiLU over packed sequences, its history in a pool."""

from nemotrt.plugins.contract import DType
from nemotrt.plugins.spec import FLOATS, PACKED_AXES, PACKED_INPUTS, OpSpec, TensorSpec, Tolerance

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
