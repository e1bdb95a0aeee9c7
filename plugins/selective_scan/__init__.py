"""Mamba-2's selective scan over packed sequences, its state in a pool."""

from nemotrt.plugins.spec import (
    FLOATS,
    PACKED_AXES,
    PACKED_INPUTS,
    AttributeSpec,
    OpSpec,
    TensorSpec,
    Tolerance,
)

SPEC = OpSpec(
    name="NemoSelectiveScan",
    label="scan",
    summary="Softplus, state-space duality over chunks or one recurrence step, and the D skip of Mamba-2.",
    axes=PACKED_AXES
    | {"H": "heads", "P": "head dim", "G": "groups of heads that share B and C", "N": "state size"},
    inputs=(
        TensorSpec("x", ("T", "H", "P"), "X"),
        TensorSpec("dt", ("T", "H"), "X"),
        TensorSpec("A", ("H",), "float32"),
        TensorSpec("B", ("T", "G", "N"), "X"),
        TensorSpec("C", ("T", "G", "N"), "X"),
        TensorSpec("D", ("H",), "float32"),
        TensorSpec("dt_bias", ("H",), "float32"),
        TensorSpec("ssm_state", ("S", "H", "P", "N"), "STATE"),
        *PACKED_INPUTS,
        TensorSpec("slot", ("B",), "int32"),
    ),
    outputs=(
        TensorSpec("y", ("T", "H", "P"), "X"),
        TensorSpec("next_ssm_state", ("S", "H", "P", "N"), "STATE"),
    ),
    attributes=(AttributeSpec("dt_min", float), AttributeSpec("dt_max", float)),
    dtypes={"X": FLOATS, "STATE": ("float32", "float16")},
    tolerances={
        "float32": Tolerance(
            1e-5, "chunked against sequential sums of up to a few hundred FP32 terms, exp included"
        ),
        "float16": Tolerance(2e-3, "FP16 factors into FP32 accumulators and one rounding of y (4.9e-4 each)"),
        "bfloat16": Tolerance(
            1.6e-2, "BF16 factors into FP32 accumulators and one rounding of y (3.9e-3 each)"
        ),
    },
    package=__name__,
)
