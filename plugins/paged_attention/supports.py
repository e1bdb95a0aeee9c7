"""What the op's kernels take: known without Triton, torch or a GPU."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from nemotrt.plugins.paged_attention import SPEC
from nemotrt.plugins.spec import FLOATS
from nemotrt.plugins.variant import check_packed, check_sm, supports_fp8

FP8 = "float8_e4m3fn"
HEAD_DIMS = (64, 128)

MAX_GROUP = 16
"""Query heads a key-value head: a decode tile has this many rows, the least that a tensor core takes."""

PAGE_SIZES = (64, 128, 192, 256)
"""Tokens a page: multiples of the key tile, so that a tile lies within one page."""


def caches(sm: int) -> Iterator[tuple[str, str]]:
    """Pairs of q's dtype and the cache's that the kernels have on an SM."""
    for dtype in FLOATS:
        yield dtype, dtype
        if supports_fp8(sm) and dtype != "float32":
            yield dtype, FP8


def supports(sizes: Mapping[str, int], dtypes: Mapping[str, str], sm: int) -> None:
    """Raise ValueError, naming the op, what does not fit and what does, where no kernel serves a call.

    `sizes` are the SPEC's axes by name, `dtypes` its dtype variables.
    """
    check_sm(SPEC.name, sm)
    pair = (dtypes["X"], dtypes["CACHE"])
    if pair[1] == FP8 and not supports_fp8(sm):
        raise ValueError(f"{SPEC.name}: SM {sm} has no FP8: use a cache of x's dtype, or SM 89 or later")
    if pair not in caches(sm):
        supported = ", ".join(f"({x}, {cache})" for x, cache in sorted(caches(sm)))
        raise ValueError(
            f"{SPEC.name}: kernels on SM {sm} take (q, kv_cache) in {supported}, not ({pair[0]}, {pair[1]})"
        )
    for axis, allowed in (("D", HEAD_DIMS), ("page", PAGE_SIZES)):
        if sizes[axis] not in allowed:
            raise ValueError(f"{SPEC.name}: kernels take {axis} in {list(allowed)}, not {sizes[axis]}")
    Q, V = sizes["Q"], sizes["V"]
    if Q % V or Q // V > MAX_GROUP:
        raise ValueError(f"{SPEC.name}: kernels take Q = 1…{MAX_GROUP} times V, not Q {Q}, V {V}")
    check_packed(SPEC.name, sizes)
