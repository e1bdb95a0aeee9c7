"""Sigmoid top-k routing and the routed experts' MLPs."""

from collections.abc import Mapping

from nemotrt.plugins.contract import DType
from nemotrt.plugins.spec import FLOATS, OpSpec, TensorSpec, Tolerance
from nemotrt.plugins.variant import (
    MAX_INT32,
    check_sm,
    require_multiple,
    require_one_of,
    require_range,
    supports_fp8,
)

SPEC = OpSpec(
    name="NemoMoeDispatch",
    label="experts",
    summary="Sigmoid top-k with correction bias, expert MLPs with squared ReLU, weighted combine.",
    axes={
        "T": "tokens in this step",
        "L": "the experts' input and output: the latent, or the hidden size",
        "R": "experts that the router chooses from",
        "E": "experts whose weights are here: all of them, or this rank's",
        "I": "an expert's inner size",
    },
    inputs=(
        TensorSpec("x", ("T", "L"), "X"),
        TensorSpec("router_logits", ("T", "R"), DType.FLOAT32),
        TensorSpec("correction_bias", ("R",), DType.FLOAT32),
        TensorSpec("up", ("E", "I", "L"), "W"),
        TensorSpec("down", ("E", "L", "I"), "W"),
        TensorSpec("up_scale", ("E", "I"), DType.FLOAT32),
        TensorSpec("down_scale", ("E", "L"), DType.FLOAT32),
        TensorSpec("input_scale", (1,), DType.FLOAT32),
        TensorSpec("hidden_scale", (1,), DType.FLOAT32),
    ),
    outputs=(TensorSpec("y", ("T", "L"), "X"),),
    attributes={
        "top_k": int,
        "num_groups": int,
        "topk_group": int,
        "norm_topk_prob": int,
        "routed_scaling_factor": float,
        "first_expert": int,
    },
    dtypes={"X": FLOATS, "W": (*FLOATS, DType.FLOAT8_E4M3)},
    tolerances={
        DType.FLOAT32: Tolerance(
            1e-5, "two FP32 matrix products of up to a few thousand terms, summed in another order"
        ),
        DType.FLOAT16: Tolerance(2e-3, "the hidden activation and y are rounded once each (4.9e-4)"),
        DType.BFLOAT16: Tolerance(1.6e-2, "the hidden activation and y are rounded once each (3.9e-3)"),
        DType.FLOAT8_E4M3: Tolerance(
            3e-2, "an activation on a rounding boundary may fall to either of two E4M3 neighbours (6% apart)"
        ),
    },
    package=__name__,
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
