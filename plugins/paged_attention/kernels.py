# mypy: disable-error-code="no-untyped-def,untyped-decorator"
# Python's types cannot express the types of a jit function's parameters.
"""The op's Triton kernels.

Legend: T tokens, B sequences, Q query heads, V key-value heads, G = Q / V, D head dim, M pages of a sequence.

- `paged_append` runs first: a program owns a block of packed tokens and one key-value head, and writes their keys
  and values into their pages, in FP8 if the cache is FP8. It also zeroes o of padding tokens.
- `paged_decode`: a program owns one sequence, one key-value head and one of `splits` equal parts of the sequence's
  keys. It processes short sequences: those of at most `short` tokens if T > B, and all if T ≤ B.
- `paged_combine`, after paged_decode: a program owns one token of a short sequence and one query head, and adds up
  the parts in order.
- `paged_prefill` (only if T > B): a program owns a block of tokens of one long sequence and one key-value head.

A tile of queries contains tokens × the G heads that share keys, so that each tile of keys is read once for all of
them. The cache is updated in place: the rows that paged_append writes are read only by later launches.
Softmax and sums are FP32, in powers of 2; probabilities are rounded to q's dtype for the tensor cores.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
import triton
import triton.language as tl

from nemotrt.plugins.contract import DType
from nemotrt.plugins.paged_attention import HEAD_DIMS, MAX_GROUP, SPEC, caches, supports
from nemotrt.plugins.spec import FLOATS
from nemotrt.plugins.variant import Launch, Variant, check_sm, device_sm

LOG2_E = tl.constexpr(1.4426950408889634)


@triton.jit
def sequence_of(query_start, token, B):
    """The sequence of each token: the last that starts at or before it; padding counts as the last sequence."""
    low = token * 0
    high = low + B
    width = B
    while width > 1:
        middle = (low + high) // 2
        reached = tl.load(query_start + middle) <= token
        low = tl.where(reached, middle, low)
        high = tl.where(reached, high, middle)
        width = (width + 1) // 2
    return low


@triton.jit
def to_e4m3(values):
    """FP32 values in E4M3, rounded once to nearest even, saturated at ±448; NaN stays NaN.

    Triton's own conversion rounds twice on SM 89: to FP16 toward zero, then to E4M3.
    """
    return tl.inline_asm_elementwise(
        """
        {
        .reg .b16 low, high;
        cvt.rn.satfinite.e4m3x2.f32 low, $2, $1;
        cvt.rn.satfinite.e4m3x2.f32 high, $4, $3;
        mov.b32 $0, {low, high};
        }
        """,
        "=r,f,f,f,f",
        [values],
        dtype=tl.float8e4nv,
        is_pure=True,
        pack=4,
    )


@triton.jit
def cached(values, scale, kv_cache):
    """Keys or values as stored in the cache; for FP8, divided by their scale and saturated."""
    if kv_cache.dtype.element_ty == tl.float8e4nv:
        # `/` is approximate, and would differ from the reference's bits near a tie.
        values = to_e4m3(tl.math.div_rn(values.to(tl.float32), tl.load(scale)))
    return values.to(kv_cache.dtype.element_ty)


@triton.jit
def cache_scale(scale, kv_cache):
    """The factor of the cache's values: 1 unless the cache is FP8."""
    factor = 1.0
    if kv_cache.dtype.element_ty == tl.float8e4nv:
        factor = tl.load(scale)
    return factor


@triton.jit
def dot_query(query, kv_cache, factor):
    """Queries in the dtype of the products with keys, and the factor from each row's products to scores.

    FP8 keys are converted to FP16: GPUs have an instruction for that, but none for BF16. A row of BF16 queries is
    converted to FP16 too, after division by a power of two. This is exact, except that values below 2⁻¹⁴ of the
    row's maximum are rounded to multiples of 2⁻²⁴ of it.
    """
    factors = tl.full([query.shape[0]], 1.0, tl.float32) * factor
    if kv_cache.dtype.element_ty == tl.float8e4nv and query.dtype == tl.bfloat16:
        numbers = query.to(tl.float32)
        largest = tl.max(tl.abs(numbers), axis=1)
        power = largest.to(tl.int32, bitcast=True) & 0x7F800000  # 2^e: the exponent alone
        inverse = (0x7F000000 - power).to(tl.float32, bitcast=True)  # 2^−e
        query = (numbers * inverse[:, None]).to(tl.float16)
        factors *= power.to(tl.float32, bitcast=True)
    return query, factors


@triton.jit
def paged_append(
    k,
    v,
    kv_cache,
    k_scale,
    v_scale,
    query_start,
    context_len,
    page_table,
    o,
    T,
    B,
    Q,
    V,
    M,
    page,
    D: tl.constexpr,
    BLOCK_T: tl.constexpr,
):
    """Grid (token blocks, V, 1): writes a block of keys and values to their pages, and zeroes o of padding."""
    t = tl.program_id(0) * BLOCK_T + tl.arange(0, BLOCK_T)
    head = tl.program_id(1)
    d = tl.arange(0, D)
    source = (t.to(tl.int64) * V + head)[:, None] * D + d[None, :]
    in_step = (t < T)[:, None]
    key = tl.load(k + source, mask=in_step, other=0.0)
    value = tl.load(v + source, mask=in_step, other=0.0)

    padding_start = tl.load(query_start + B)
    used = t < padding_start
    b = sequence_of(query_start, t, B)
    position = tl.load(context_len + b) + t - tl.load(query_start + b)
    page_index = tl.load(page_table + b.to(tl.int64) * M + position // page, mask=used, other=0).to(tl.int64)
    target = ((page_index * 2 * V + head) * page + position % page)[:, None] * D + d[None, :]
    tl.store(kv_cache + target, cached(key, k_scale, kv_cache), mask=used[:, None])
    tl.store(kv_cache + V * page * D + target, cached(value, v_scale, kv_cache), mask=used[:, None])

    if (tl.program_id(0) + 1) * BLOCK_T > padding_start:
        group = Q // V
        padding = (t >= padding_start)[:, None] & in_step
        zero = tl.zeros([BLOCK_T, D], o.dtype.element_ty)
        for g in range(0, group):
            row = t.to(tl.int64) * Q + head * group + g
            tl.store(o + row[:, None] * D + d[None, :], zero, mask=padding)


@triton.jit
def attend(
    query,
    top,
    mass,
    total,
    first,
    last,
    position,
    num_keys,
    pages,
    keys,
    V,
    page,
    factors,
    D: tl.constexpr,
    BLOCK_N: tl.constexpr,
    MASKED: tl.constexpr,
):
    """The softmax over keys first…last − 1: maximum score, sum of 2^(score − maximum), weighted sum of values.

    `position` is the position of each row, `keys` the cache at page 0 and this head. A row attends to keys up to its
    position; unless MASKED, all keys must satisfy that.
    """
    n = tl.arange(0, BLOCK_N)
    tile = n[:, None] * D + tl.arange(0, D)[None, :]
    # Load page numbers one tile ahead: a load that depends on another one costs pipeline stages.
    page_index = tl.load(pages + first // page, mask=first < last, other=0)
    for n0 in range(first, last, BLOCK_N):
        row = page_index.to(tl.int64) * 2 * V * page + n0 % page
        page_index = tl.load(pages + (n0 + BLOCK_N) // page, mask=n0 + BLOCK_N < last, other=0)
        key = tl.load(keys + row * D + tile).to(query.dtype)
        if MASKED:  # rows past the last key may contain NaN, and 0 · NaN is NaN
            value = tl.load(keys + (row + V * page) * D + tile, mask=(n0 + n < num_keys)[:, None], other=0.0)
        else:
            value = tl.load(keys + (row + V * page) * D + tile)
        score = tl.dot(query, tl.trans(key), input_precision="ieee") * factors[:, None]
        if MASKED:
            score = tl.where((n0 + n)[None, :] <= position[:, None], score, -float("inf"))
        best = tl.maximum(top, tl.max(score, axis=1))
        shift = best
        if MASKED:  # for a row without keys so far, the sums stay 0 instead of NaN
            shift = tl.where(best == -float("inf"), 0.0, best)
        probability = tl.exp2(score - shift[:, None])
        fade = tl.exp2(top - shift)
        mass = mass * fade + tl.sum(probability, axis=1)
        total = tl.dot(
            probability.to(query.dtype), value.to(query.dtype), total * fade[:, None], input_precision="ieee"
        )
        top = best
    return top, mass, total


@triton.jit
def paged_decode(
    q,
    kv_cache,
    k_scale,
    v_scale,
    query_start,
    context_len,
    page_table,
    partial,
    lse,
    scale,
    T,
    B,
    Q,
    V,
    M,
    page,
    splits,
    short,
    D: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """Grid (splits, V, B): partial o, and log2 of its softmax sum, from one part of the keys.

    A token's row in partial [rows, Q, splits, D] and lse [rows, Q, splits] is t if T ≤ B, else b · short + i.
    A part with no keys for a token has lse −inf, and its partial o is not written.
    """
    split = tl.program_id(0)
    head = tl.program_id(1)
    b = tl.program_id(2)
    start = tl.load(query_start + b)
    length = tl.load(query_start + b + 1) - start
    if (length > 0) & ((T <= B) | (length <= short)):
        context = tl.load(context_len + b)
        num_keys = context + length
        part = tl.cdiv(tl.cdiv(num_keys, BLOCK_N), splits) * BLOCK_N
        first = split * part
        group = Q // V
        step = BLOCK_M // group
        m = tl.arange(0, BLOCK_M)
        d = tl.arange(0, D)
        keys = kv_cache + head * page * D
        factor = scale * cache_scale(k_scale, kv_cache) * LOG2_E
        row = start
        if T > B:
            row = b * short
        for i0 in range(0, length, step):
            i = i0 + m // group
            own = (m < step * group) & (i < length)
            query_head = head * group + m % group
            source = (start + i).to(tl.int64) * Q + query_head
            query = tl.load(q + source[:, None] * D + d[None, :], mask=own[:, None], other=0.0)
            query, factors = dot_query(query, kv_cache, factor)
            top, mass, total = attend(
                query,
                tl.full([BLOCK_M], -float("inf"), tl.float32),
                tl.zeros([BLOCK_M], tl.float32),
                tl.zeros([BLOCK_M, D], tl.float32),
                first,
                tl.minimum(first + part, tl.minimum(context + i0 + step, num_keys)),
                context + i,
                num_keys,
                page_table + b.to(tl.int64) * M,
                keys,
                V,
                page,
                factors,
                D,
                BLOCK_N,
                True,
            )
            seen = mass != 0.0  # NaN counts, so that it reaches the output
            total = total / mass[:, None] * cache_scale(v_scale, kv_cache)
            target = ((row + i).to(tl.int64) * Q + query_head) * splits + split
            tl.store(lse + target, tl.where(seen, top + tl.log2(mass), -float("inf")), mask=own)
            tl.store(partial + target[:, None] * D + d[None, :], total, mask=(own & seen)[:, None])


@triton.jit
def paged_combine(
    partial,
    lse,
    query_start,
    o,
    T,
    B,
    Q,
    splits,
    short,
    D: tl.constexpr,
    BLOCK_S: tl.constexpr,
):
    """Grid (rows, Q, 1): o of one token of a short sequence and one head, from the parts of paged_decode."""
    row = tl.program_id(0)
    head = tl.program_id(1)
    token = row
    used = row < tl.load(query_start + B)
    if T > B:
        start = tl.load(query_start + row // short)
        length = tl.load(query_start + row // short + 1) - start
        token = start + row % short
        used = (row % short < length) & (length <= short)
    if used:
        d = tl.arange(0, D)
        base = (row.to(tl.int64) * Q + head) * splits
        top = -float("inf")
        mass = 0.0
        total = tl.zeros([D], tl.float32)
        for s0 in range(0, splits, BLOCK_S):
            s = s0 + tl.arange(0, BLOCK_S)
            log = tl.load(lse + base + s, mask=s < splits, other=-float("inf"))
            part = tl.load(
                partial + (base + s)[:, None] * D + d[None, :], mask=(log > -float("inf"))[:, None], other=0.0
            )
            best = tl.maximum(top, tl.max(log, axis=0))
            shift = tl.where(best == -float("inf"), 0.0, best)
            weight = tl.exp2(log - shift)
            fade = tl.exp2(top - shift)
            mass = mass * fade + tl.sum(weight, axis=0)
            total = total * fade + tl.sum(weight[:, None] * part, axis=0)
            top = best
        target = o + (token.to(tl.int64) * Q + head) * D + d
        tl.store(target, (total / mass).to(o.dtype.element_ty))


@triton.jit
def paged_prefill(
    q,
    kv_cache,
    k_scale,
    v_scale,
    query_start,
    context_len,
    page_table,
    o,
    scale,
    B,
    Q,
    V,
    M,
    page,
    short,
    D: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """Grid (T // step + B, V, 1), step = BLOCK_M // G: o of `step` tokens of a long sequence."""
    block = (
        tl.num_programs(0) - 1 - tl.program_id(0)
    )  # the last blocks have the most keys, so start with them
    head = tl.program_id(1)
    group = Q // V
    step = BLOCK_M // group
    # Sequence b's blocks begin at query_start[b] // step + b, which leaves room for a last, partial one:
    # find the last b that begins at or before this block.
    b = 0
    high = B
    while high - b > 1:
        middle = (b + high) // 2
        if tl.load(query_start + middle) // step + middle <= block:
            b = middle
        else:
            high = middle
    start = tl.load(query_start + b)
    length = tl.load(query_start + b + 1) - start
    i0 = (block - start // step - b) * step
    if (i0 < length) & (length > short):
        context = tl.load(context_len + b)
        num_keys = context + length
        m = tl.arange(0, BLOCK_M)
        d = tl.arange(0, D)
        i = i0 + m // group
        own = (m < step * group) & (i < length)
        row = (start + i).to(tl.int64) * Q + head * group + m % group
        query = tl.load(q + row[:, None] * D + d[None, :], mask=own[:, None], other=0.0)
        keys = kv_cache + head * page * D
        pages = page_table + tl.cast(b, tl.int64) * M
        query, factors = dot_query(query, kv_cache, scale * cache_scale(k_scale, kv_cache) * LOG2_E)
        seen_by_all = (context + i0 + 1) // BLOCK_N * BLOCK_N
        top, mass, total = attend(
            query,
            tl.full([BLOCK_M], -float("inf"), tl.float32),
            tl.zeros([BLOCK_M], tl.float32),
            tl.zeros([BLOCK_M, D], tl.float32),
            0,
            seen_by_all,
            context + i,
            num_keys,
            pages,
            keys,
            V,
            page,
            factors,
            D,
            BLOCK_N,
            False,
        )
        top, mass, total = attend(
            query,
            top,
            mass,
            total,
            seen_by_all,
            tl.minimum(context + i0 + step, num_keys),
            context + i,
            num_keys,
            pages,
            keys,
            V,
            page,
            factors,
            D,
            BLOCK_N,
            True,
        )
        total = total / mass[:, None] * cache_scale(v_scale, kv_cache)
        tl.store(o + row[:, None] * D + d[None, :], total.to(o.dtype.element_ty), mask=own[:, None])


KERNELS = {
    "paged_append": paged_append,
    "paged_decode": paged_decode,
    "paged_combine": paged_combine,
    "paged_prefill": paged_prefill,
}

_ATTENTION = ("q", "kv_cache", "k_scale", "v_scale", "query_start", "context_len", "page_table")

POINTERS = {
    "paged_append": ("k", "v", *_ATTENTION[1:], "o"),
    "paged_decode": (*_ATTENTION, "partial", "lse"),
    "paged_combine": ("partial", "lse", "query_start", "o"),
    "paged_prefill": (*_ATTENTION, "o"),
}
"""Pointers of each kernel, in declaration order, by the SPEC's names and the workspace's."""

SCALARS = {
    "paged_append": ("T", "B", "Q", "V", "M", "page"),
    "paged_decode": ("scale", "T", "B", "Q", "V", "M", "page", "splits", "short"),
    "paged_combine": ("T", "B", "Q", "splits", "short"),
    "paged_prefill": ("scale", "B", "Q", "V", "M", "page", "short"),
}
"""Runtime scalars of each kernel, in declaration order, after its pointers; `scale` is FP32, the others int32."""

DECODE_ROWS = MAX_GROUP
"""Rows of a decode tile; a sequence is short if its rows, tokens × G, fit in one."""

DECODE_PROGRAMS = 1024
"""Target number of paged_decode programs: four waves of two on each of 128 SMs. Not tuned by measurement."""

MIN_SPLIT_KEYS = 128
"""The minimum number of keys of a part: two tiles."""

BLOCK_T = 16
BLOCK_N = 64
BLOCK_S = 16


def shape(kernel: str, dtype: str, head_dim: int, sm: int) -> tuple[dict[str, int], int, int]:
    """A kernel's block sizes, warps and pipeline stages, which fit an SM's registers and shared memory."""
    if kernel == "paged_append":
        return {"D": head_dim, "BLOCK_T": BLOCK_T}, 4, 1
    if kernel == "paged_combine":
        return {"D": head_dim, "BLOCK_S": BLOCK_S}, 4, 1
    if dtype == "float32":  # no tensor cores: small tiles, for their registers
        return {"D": head_dim, "BLOCK_M": DECODE_ROWS, "BLOCK_N": BLOCK_N // 2}, 8, 2
    if kernel == "paged_decode":  # with 228 KB, two programs of 102 KB (D 128, 16 bits) share an SM
        return {"D": head_dim, "BLOCK_M": DECODE_ROWS, "BLOCK_N": BLOCK_N}, 4, 4 if sm in (90, 100) else 3
    return {"D": head_dim, "BLOCK_M": 128, "BLOCK_N": BLOCK_N}, 8, 3


def variant(kernel: str, dtype: str, cache: str, head_dim: int, sm: int) -> Variant:
    """The variant of a kernel for q's dtype and the cache's dtype on an SM."""
    kinds = {"X": dtype, "CACHE": cache}
    types = {tensor.name: kinds.get(tensor.dtype, tensor.dtype) for tensor in (*SPEC.inputs, *SPEC.outputs)}
    types |= {"partial": "float32", "lse": "float32"}
    blocks, num_warps, num_stages = shape(kernel, dtype, head_dim, sm)
    return Variant(
        kernel=kernel,
        signature={name: f"*{DType(types[name]).triton}" for name in POINTERS[kernel]}
        | {name: "fp32" if name == "scale" else "i32" for name in SCALARS[kernel]},
        constants=dict(blocks),
        num_warps=num_warps,
        num_stages=num_stages,
        aligned=(*POINTERS[kernel], *(("page",) if "page" in SCALARS[kernel] else ())),
    )


def variants(sm: int) -> Iterator[Variant]:
    """Every variant of the op on an SM; raises ValueError if the SM is not in `SMS`."""
    check_sm(SPEC.name, sm)
    for head_dim in HEAD_DIMS:
        for kernel in ("paged_append", "paged_decode", "paged_prefill"):
            for dtype, cache in caches(sm):
                yield variant(kernel, dtype, cache, head_dim, sm)
        for dtype in FLOATS:
            yield variant("paged_combine", dtype, dtype, head_dim, sm)


def short_tokens(sizes: dict[str, int]) -> int:
    """The maximum length of sequences that paged_decode processes if T > B."""
    return DECODE_ROWS // (sizes["Q"] // sizes["V"])


def num_splits(sizes: dict[str, int]) -> int:
    """The number of parts of a sequence's keys: enough programs for the GPU, but not too small parts."""
    enough = DECODE_PROGRAMS // (sizes["B"] * sizes["V"])
    worth: int = triton.cdiv(sizes["M"] * sizes["page"], MIN_SPLIT_KEYS)
    return max(1, min(enough, worth))


def workspace(sizes: dict[str, int]) -> dict[str, int]:
    """FP32 elements of each scratch buffer; they grow with the sizes, so the maximum sizes' buffers fit every step."""
    parts = sizes["B"] * triton.cdiv(sizes["M"] * sizes["page"], MIN_SPLIT_KEYS)
    rows = short_tokens(sizes) * sizes["Q"] * max(sizes["B"], min(DECODE_PROGRAMS // sizes["V"], parts))
    return {"partial": rows * sizes["D"], "lse": rows}


def launches(sizes: dict[str, int], dtypes: dict[str, str], sm: int) -> list[Launch]:
    """The launches for these sizes (the SPEC's axes) and dtypes (its variables), in order."""
    supports(sizes, dtypes, sm)
    T, B, Q, V = (sizes[axis] for axis in ("T", "B", "Q", "V"))
    short = short_tokens(sizes)
    integers = sizes | {"short": short, "splits": num_splits(sizes)}
    grids = {
        "paged_append": (triton.cdiv(T, BLOCK_T), V, 1),
        "paged_decode": (integers["splits"], V, B),
        "paged_combine": (T if T <= B else B * short, Q, 1),
        "paged_prefill": (0, V, 1),
    }
    if T <= B:
        del grids["paged_prefill"]
    plan = []
    for kernel, grid in grids.items():
        form = variant(kernel, dtypes["X"], dtypes["CACHE"], sizes["D"], sm)
        if kernel == "paged_prefill":
            grid = (T // (int(form.constants["BLOCK_M"]) // (Q // V)) + B, V, 1)
        names = [name for name in SCALARS[kernel] if name != "scale"]
        plan.append(Launch(form, grid, {name: integers[name] for name in names}))
    return plan


def run(*tensors: torch.Tensor, scale: float) -> tuple[torch.Tensor, torch.Tensor]:
    """Run the op like its reference, with the kernels: inputs in SPEC order → o [T, Q, D], next cache.

    Runs on the tensors' device, or on a CPU in Triton's interpreter. Raises ValueError as `supports` does.
    """
    sizes = SPEC.sizes([tuple(tensor.shape) for tensor in tensors])
    buffers = {spec.name: tensor.contiguous() for spec, tensor in zip(SPEC.inputs, tensors, strict=True)}
    buffers["kv_cache"] = buffers["kv_cache"].clone()
    buffers["o"] = torch.empty_like(buffers["q"])
    for name, size in workspace(sizes).items():
        buffers[name] = torch.empty(size, dtype=torch.float32, device=tensors[0].device)
    dtypes = {
        "X": str(buffers["q"].dtype).removeprefix("torch."),
        "CACHE": str(buffers["kv_cache"].dtype).removeprefix("torch."),
    }
    execute(launches(sizes, dtypes, device_sm(tensors[0].device)), buffers, scale)
    return buffers["o"], buffers["kv_cache"]


def execute(plan: list[Launch], buffers: dict[str, torch.Tensor], scale: float) -> None:
    """Launch a plan on contiguous tensors by pointer name: writes o [T, Q, D], updates kv_cache in place."""
    for launch in plan:
        launch.start(KERNELS[launch.variant.kernel], {**buffers, "scale": scale})
