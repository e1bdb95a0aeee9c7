"""Sigmoid top-k routing and the routed experts' MLPs."""

from nemotrt.plugins.contract import DType
from nemotrt.plugins.spec import FLOATS, OpSpec, TensorSpec, Tolerance

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
