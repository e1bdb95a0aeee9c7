"""The sizes and dtypes that the op's kernels support; needs neither Triton, torch nor a GPU."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from nemotrt.plugins.contract import DType
from nemotrt.plugins.paged_attention import SPEC
from nemotrt.plugins.spec import FLOATS
from nemotrt.plugins.variant import check_sm, require, require_one_of, require_packed, supports_fp8

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
