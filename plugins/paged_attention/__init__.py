"""Causal grouped-query attention over a paged key-value cache."""

from nemotrt.plugins.contract import DType
from nemotrt.plugins.spec import FLOATS, PACKED_AXES, PACKED_INPUTS, OpSpec, TensorSpec, Tolerance

SPEC = OpSpec(
    name="NemoPagedAttention",
    label="attention",
    summary="Appends keys and values to their sequence's pages and attends causally over them.",
    axes={name: PACKED_AXES[name] for name in ("T", "B", "B+1")}
    | {
        "Q": "query heads",
        "V": "key-value heads",
        "D": "head dim",
        "K": "pages in the pool, page 0 is scratch",
        "page": "tokens a page",
        "M": "pages of one sequence",
    },
    inputs=(
        TensorSpec("q", ("T", "Q", "D"), "X"),
        TensorSpec("k", ("T", "V", "D"), "X"),
        TensorSpec("v", ("T", "V", "D"), "X"),
        TensorSpec("kv_cache", ("K", 2, "V", "page", "D"), "CACHE"),
        TensorSpec("k_scale", (1,), DType.FLOAT32),
        TensorSpec("v_scale", (1,), DType.FLOAT32),
        *PACKED_INPUTS,
        TensorSpec("page_table", ("B", "M"), DType.INT32),
    ),
    outputs=(
        TensorSpec("o", ("T", "Q", "D"), "X"),
        TensorSpec("next_kv_cache", ("K", 2, "V", "page", "D"), "CACHE"),
    ),
    attributes={"scale": float},
    dtypes={"X": FLOATS, "CACHE": (*FLOATS, DType.FLOAT8_E4M3)},
    tolerances={
        DType.FLOAT32: Tolerance(1e-5, "softmax over a few thousand FP32 scores, summed in another order"),
        DType.FLOAT16: Tolerance(2e-3, "probabilities and o are rounded once each (4.9e-4)"),
        DType.BFLOAT16: Tolerance(1.6e-2, "probabilities and o are rounded once each (3.9e-3)"),
        DType.FLOAT8_E4M3: Tolerance(2e-3, "the cache's bits are equal: what is left is FP16 arithmetic"),
    },
    package=__name__,
)
