"""The attention kernels match the reference in Triton's interpreter."""

from __future__ import annotations

from dataclasses import dataclass, replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from interpreter import interpreted, interpreting

from nemotrt.plugins.paged_attention import SPEC
from nemotrt.plugins.paged_attention.reference import reference
from nemotrt.plugins.variant import SMS, supports_fp8

kernels = interpreted("nemotrt.plugins.paged_attention.kernels")

FP8 = torch.float8_e4m3fn
DTYPES = [
    *((dtype, dtype) for dtype in (torch.float32, torch.float16, torch.bfloat16)),
    *((torch.float16, FP8), (torch.bfloat16, FP8)),
]
FEW = settings(max_examples=16, deadline=None, derandomize=True, database=None)


@dataclass(frozen=True)
class Case:
    """A step: each sequence's length and context, the number of padding tokens, and the other sizes."""

    lengths: list[int]
    contexts: list[int]
    padding: int = 0
    kv_heads: int = 1
    group: int = 4
    head_dim: int = 64
    page: int = 64
    spare_pages: int = 0
    dtype: torch.dtype = torch.float16
    cache: torch.dtype = torch.float16


def steps(lengths: st.SearchStrategy[list[int]]) -> st.SearchStrategy[Case]:
    context = st.one_of(st.just(0), st.integers(1, 8), st.sampled_from([63, 64, 65, 150]))
    return lengths.flatmap(
        lambda drawn: st.builds(
            lambda dtypes, **named: Case(drawn, dtype=dtypes[0], cache=dtypes[1], **named),
            dtypes=st.sampled_from(DTYPES),
            contexts=st.lists(context, min_size=len(drawn), max_size=len(drawn)),
            padding=st.integers(0 if any(drawn) else 1, 3),
            kv_heads=st.sampled_from([1, 2]),
            group=st.sampled_from([1, 3, 16]),
            page=st.sampled_from([64, 128]),
        )
    )


def tensors(case: Case) -> list[torch.Tensor]:
    """Inputs in SPEC order, NaN where the op must not read: padding, free pages, rows not yet written."""
    generator = torch.Generator().manual_seed(0)
    num_tokens, num_sequences = sum(case.lengths), len(case.lengths)
    totals = [length + context for length, context in zip(case.lengths, case.contexts, strict=True)]
    used = [-(-total // case.page) for total in totals]
    num_pages = sum(used) + 2

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator)

    def tokens(heads: int, size: float) -> torch.Tensor:
        padding = torch.full((case.padding, heads, case.head_dim), torch.nan)
        return torch.cat([normal(num_tokens, heads, case.head_dim) * size, padding]).to(case.dtype)

    cache = torch.full((num_pages, 2, case.kv_heads, case.page, case.head_dim), torch.nan)
    page_table = torch.zeros(num_sequences, max(*used, 1) + case.spare_pages, dtype=torch.int32)
    free = iter((torch.randperm(num_pages - 1, generator=generator) + 1).tolist())
    for b, context in enumerate(case.contexts):
        for page in range(used[b]):
            page_table[b, page] = next(free)
            rows = min(case.page, max(0, context - page * case.page))
            cache[page_table[b, page], :, :, :rows] = normal(2, case.kv_heads, rows, case.head_dim)
    scales = torch.tensor([0.004]), torch.tensor([0.013])  # 1.8 and 5.8 saturate
    return [
        *(tokens(case.kv_heads * case.group, 2), tokens(case.kv_heads, 1), tokens(case.kv_heads, 1)),
        *(cache.to(case.cache), *scales),
        torch.tensor([0, *case.lengths]).cumsum(0).int(),
        *(torch.tensor(case.contexts, dtype=torch.int32), page_table),
    ]


def name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def bits(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.view({1: torch.int8, 2: torch.int16, 4: torch.int32}[tensor.element_size()])


def check(case: Case) -> None:
    inputs = tensors(case)
    expected_o, expected_cache = reference(*inputs, scale=case.head_dim**-0.5)
    sizes = SPEC.sizes([tuple(tensor.shape) for tensor in inputs])
    buffers = dict(zip([tensor.name for tensor in SPEC.inputs], inputs, strict=True))
    buffers |= {"kv_cache": inputs[3].clone(), "o": torch.full_like(inputs[0], torch.nan)}
    buffers |= {key: torch.full((size,), torch.nan) for key, size in kernels.workspace(sizes).items()}
    plan = kernels.launches(sizes, {"X": name(case.dtype), "CACHE": name(case.cache)}, 90)
    with interpreting():
        kernels.execute(plan, buffers, case.head_dim**-0.5)

    o, used = buffers["o"], sum(case.lengths)
    error = (o[:used].double() - expected_o[:used].double()).norm()
    tolerance = max(SPEC.tolerances[name(dtype)].relative_l2 for dtype in (case.dtype, case.cache))
    assert error <= tolerance * expected_o.double().norm()
    assert torch.equal(bits(o[used:]), bits(torch.zeros_like(o[used:])))
    assert torch.equal(bits(buffers["kv_cache"]), bits(expected_cache))


@FEW
@given(steps(st.lists(st.sampled_from([0, 1, 2, 5, 6, 17, 30]), min_size=1, max_size=3)))
def test_any_mixture(case: Case) -> None:
    check(case)


@FEW
@given(steps(st.lists(st.sampled_from([0, 0, 0, 1, 1, 2, 4]), min_size=4, max_size=6)))
def test_decode_shaped_steps_of_any_lengths(case: Case) -> None:
    check(case)


@pytest.mark.parametrize(("dtype", "cache"), DTYPES, ids=str)
@pytest.mark.parametrize("head_dim", [64, 128])
def test_decode_of_one_token_each(dtype: torch.dtype, cache: torch.dtype, head_dim: int) -> None:
    check(Case([1, 1], [0, 127], kv_heads=2, group=8, head_dim=head_dim, dtype=dtype, cache=cache))


@pytest.mark.parametrize(("dtype", "cache"), DTYPES, ids=str)
@pytest.mark.parametrize("head_dim", [64, 128])
def test_prefill_among_decodes(dtype: torch.dtype, cache: torch.dtype, head_dim: int) -> None:
    case = Case([1, 30, 1], [90, 40, 0], padding=1, group=5, head_dim=head_dim, dtype=dtype, cache=cache)
    check(case)


def test_a_padded_decode_step() -> None:
    check(Case([1, 1, 0, 0], [5, 64, 0, 9], padding=2, group=16, dtype=torch.bfloat16, cache=torch.bfloat16))


@pytest.mark.parametrize("group", [3, 16])
def test_a_long_sequence_in_a_decode_shaped_step(group: int) -> None:
    check(Case([0, 7, 1, 0, 0, 0, 0, 0], [0, 60, 9, 0, 0, 0, 0, 0], group=group))


@pytest.mark.parametrize("lengths", [[1], [20]])
def test_nan_in_one_key_is_not_lost(lengths: list[int]) -> None:
    inputs = tensors(Case(lengths, [190], group=16))
    inputs[3][inputs[8][0, 0], 0, 0, 5, 5] = torch.nan
    o, _ = kernels.run(*inputs, scale=0.125)
    assert o.isnan().all()


def test_bf16_queries_of_any_size_against_an_fp8_cache() -> None:
    case = Case([1, 1, 20, 1], [70, 3, 30, 9], dtype=torch.bfloat16, cache=FP8)
    inputs = tensors(case)
    inputs[0] *= torch.tensor([1e-30, 0.0, *([1.0, 1e6] * 10), 1e30]).view(-1, 1, 1)
    expected, _ = reference(*inputs, scale=0.125)
    o, _ = kernels.run(*inputs, scale=0.125)
    errors = (o.double() - expected.double()).norm(dim=(1, 2)) / expected.double().norm(dim=(1, 2))
    assert errors.max() <= SPEC.tolerances["bfloat16"].relative_l2


def test_more_parts_than_keys_and_fewer() -> None:
    case = Case([1], [3], spare_pages=9)
    assert kernels.num_splits({"B": 1, "V": 1, "M": 10, "page": 64}) == 5
    check(case)
    check(replace(case, contexts=[300]))
    check(replace(case, contexts=[575], spare_pages=0))


def test_a_sequence_over_three_blocks_of_queries() -> None:
    check(Case([300, 1, 2], [0, 0, 3], group=1))


@pytest.mark.parametrize("page", [192, 256])
def test_larger_pages(page: int) -> None:
    check(Case([20, 1], [page - 7, 2 * page - 1], page=page))


def test_append_saturates_and_keeps_nan() -> None:
    inputs = tensors(Case([2], [0], cache=FP8))
    inputs[1][0] = 5.0
    inputs[1][1, 0, 0] = torch.nan
    _, expected = reference(*inputs, scale=0.125)
    _, cache = kernels.run(*inputs, scale=0.125)
    assert torch.equal(bits(cache), bits(expected))
    page = int(inputs[8][0, 0])
    assert cache[page, 0, 0, 0].float().unique().tolist() == [448.0]
    assert cache[page, 0, 0, 1, 0].float().isnan()


def test_append_divides_exactly() -> None:
    inputs = tensors(Case([1], [0], cache=FP8))
    inputs[1][:] = (
        1.0458984375  # 0.984375 · 1.0625, half way between two FP8 values: a product with 1 / scale is more
    )
    inputs[4][0] = 0.984375
    _, expected = reference(*inputs, scale=0.125)
    _, cache = kernels.run(*inputs, scale=0.125)
    assert torch.equal(bits(cache), bits(expected))
    assert (cache[inputs[8][0, 0], 0, 0, 0].float() == 1.0).all()


def test_scratch_may_be_shared() -> None:
    inputs = tensors(Case([1, 1, 1], [70, 0, 0]))
    inputs[8][1:] = 0
    expected_o, expected_cache = reference(*inputs, scale=0.125)
    o, cache = kernels.run(*inputs, scale=0.125)
    torch.testing.assert_close(o[0], expected_o[0], rtol=2e-3, atol=2e-3)
    assert torch.equal(bits(cache[1:]), bits(expected_cache[1:]))


@pytest.mark.parametrize("lengths", [[40, 0, 2], [1, 0, 1]])
def test_run_is_functional_and_repeatable(lengths: list[int]) -> None:
    inputs = tensors(Case(lengths, [70, 3, 66], padding=1, cache=FP8))
    copies = [tensor.clone() for tensor in inputs]
    first, second = kernels.run(*inputs, scale=0.125), kernels.run(*inputs, scale=0.125)
    assert all(torch.equal(bits(a), bits(b)) for a, b in zip(first, second, strict=True))
    assert all(torch.equal(bits(a), bits(b)) for a, b in zip(inputs, copies, strict=True))


SIZES = {"T": 64, "B": 64, "Q": 32, "V": 2, "D": 128, "K": 9000, "page": 128, "M": 64}


def test_shapes_alone_pick_the_launches() -> None:
    dtypes = {"X": "bfloat16", "CACHE": "float8_e4m3fn"}
    decode = {launch.variant.kernel: launch.grid for launch in kernels.launches(SIZES, dtypes, 90)}
    assert decode == {"paged_append": (4, 2, 1), "paged_decode": (8, 2, 64), "paged_combine": (64, 32, 1)}
    mixed = {
        launch.variant.kernel: launch.grid for launch in kernels.launches(SIZES | {"T": 8192}, dtypes, 90)
    }
    assert list(mixed) == ["paged_append", "paged_decode", "paged_combine", "paged_prefill"]
    assert mixed["paged_prefill"] == (8192 // 8 + 64, 2, 1)


@settings(max_examples=200, deadline=None, derandomize=True, database=None)
@given(
    *(st.integers(1, most) for most in (300, 20, 5, 16)),
    st.sampled_from([64, 128, 256]),
    st.integers(1, 2000),
    st.sampled_from(["T", "B", "M"]),
)
def test_workspace_suffices_and_grows(
    B: int, extra: int, V: int, group: int, page: int, M: int, grown: str
) -> None:
    sizes = {"T": B + extra, "B": B, "Q": V * group, "V": V, "D": 64, "K": 9, "page": page, "M": M}
    combine = kernels.launches(sizes, {"X": "float16", "CACHE": "float16"}, 90)[2]
    rows = combine.grid[0] * combine.grid[1] * combine.integers["splits"]
    size = kernels.workspace(sizes)
    assert rows <= size["lse"]
    assert rows * 64 <= size["partial"]
    larger = kernels.workspace(sizes | {grown: sizes[grown] + 1})
    assert all(larger[key] >= size[key] for key in size)


@pytest.mark.parametrize("sm", SMS)
def test_every_launch_is_a_listed_variant(sm: int) -> None:
    listed = list(kernels.variants(sm))
    assert len({variant.name for variant in listed}) == len(listed)
    for dtype, cache in DTYPES:
        if cache == FP8 and not supports_fp8(sm):
            continue
        for change in ({"T": 1}, {"T": 9999}, {"D": 64, "T": 9999}):
            dtypes = {"X": name(dtype), "CACHE": name(cache)}
            assert all(launch.variant in listed for launch in kernels.launches(SIZES | change, dtypes, sm))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"D": 96}, "D to be one of 64, 128, got 96"),
        ({"page": 32}, "page to be one of 64, 128, 192, 256, got 32"),
        ({"Q": 34}, "Q to be 1 to 16 times V, got Q 34, V 2"),
        ({"Q": 33}, "got Q 33, V 2"),
        ({"T": 0}, "T to be from 1 to 2147483647, got 0"),
        ({"B": 70000}, "B to be from 1 to 65535, got 70000"),
    ],
)
def test_refusals_name_the_op_and_the_size(change: dict[str, int], message: str) -> None:
    with pytest.raises(ValueError, match=f"NemoPagedAttention: .*{message}"):
        kernels.supports(SIZES | change, {"X": "float16", "CACHE": "float16"}, 90)


@pytest.mark.parametrize(
    ("sm", "dtype", "cache"),
    [(90, "float16", "bfloat16"), (90, "float32", "float8_e4m3fn")],
)
def test_refusals_of_dtypes(sm: int, dtype: str, cache: str) -> None:
    with pytest.raises(ValueError, match=rf"NemoPagedAttention: .* SM {sm} .* got \({dtype}, {cache}\)"):
        kernels.supports(SIZES, {"X": dtype, "CACHE": cache}, sm)


def test_refusal_of_an_sm() -> None:
    with pytest.raises(
        ValueError, match=r"NemoPagedAttention: the kernels require the SM to be one of .*, got 75"
    ):
        list(kernels.variants(75))


def test_refusal_of_an_fp8_cache_says_what_to_use() -> None:
    with pytest.raises(ValueError, match="SM 86 has no FP8: use a cache of x's dtype, or SM 89 or later"):
        kernels.supports(SIZES, {"X": "float16", "CACHE": "float8_e4m3fn"}, 86)
