"""Causal grouped-query attention over a paged key-value cache."""

from collections.abc import Iterator, Mapping

from nemotrt.plugins.contract import DType
from nemotrt.plugins.spec import FLOATS, PACKED_AXES, PACKED_INPUTS, OpSpec, TensorSpec, Tolerance
from nemotrt.plugins.variant import check_sm, require, require_one_of, require_packed, supports_fp8

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

FP8 = DType.FLOAT8_E4M3
HEAD_DIMS = (64, 128)

MAX_GROUP = 16
"""The maximum number of query heads per key-value head: the rows of a decode tile, the minimum for tensor cores."""

PAGE_SIZES = (64, 128, 192, 256)
"""Tokens per page: multiples of the key tile, so that a tile lies in one page."""


def caches(sm: int) -> Iterator[tuple[DType, DType]]:
    """The pairs of q's dtype and the cache's dtype that the kernels support on an SM."""
    for dtype in FLOATS:
        yield dtype, dtype
        if supports_fp8(sm) and dtype != DType.FLOAT32:
            yield dtype, FP8


def supports(sizes: Mapping[str, int], dtypes: Mapping[str, str], sm: int) -> None:
    """Raise ValueError if no kernel supports a call; the message names the op, the value and the supported values.

    `sizes` are the SPEC's axes by name, `dtypes` its dtype variables.
    """
    check_sm(SPEC.name, sm)
    if dtypes["CACHE"] == FP8 and not supports_fp8(sm):
        raise ValueError(f"{SPEC.name}: SM {sm} has no FP8: use a cache of x's dtype, or SM 89 or later")
    pairs = [f"({x}, {cache})" for x, cache in caches(sm)]
    require_one_of(SPEC.name, f"(X, CACHE) on SM {sm}", f"({dtypes['X']}, {dtypes['CACHE']})", pairs)
    require_one_of(SPEC.name, "D", sizes["D"], HEAD_DIMS)
    require_one_of(SPEC.name, "page", sizes["page"], PAGE_SIZES)
    Q, V = sizes["Q"], sizes["V"]
    require(SPEC.name, "Q", f"Q {Q}, V {V}", Q % V == 0 and Q // V <= MAX_GROUP, f"1 to {MAX_GROUP} times V")
    require_packed(SPEC.name, sizes)
