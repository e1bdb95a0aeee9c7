"""The convolution's kernels match the reference in Triton's interpreter."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from interpreter import interpreted, interpreting

from nemotrt.plugins.causal_conv1d import SPEC
from nemotrt.plugins.causal_conv1d.reference import reference
from nemotrt.plugins.variant import SMS

kernels = interpreted("nemotrt.plugins.causal_conv1d.kernels")
BLOCK_T = kernels.BLOCKS["conv_tokens"]["BLOCK_T"]

LENGTHS = st.one_of(st.integers(0, 5), st.integers(BLOCK_T - 4, BLOCK_T + 4))


@dataclass(frozen=True)
class Case:
    """A step: each sequence's length and whether it continues, the number of padding tokens, and the other sizes."""

    lengths: list[int]
    continued: list[bool]
    padding: int
    channels: int
    taps: int
    dtype: torch.dtype


def steps(lengths: st.SearchStrategy[list[int]]) -> st.SearchStrategy[Case]:
    return lengths.flatmap(
        lambda drawn: st.builds(
            Case,
            lengths=st.just(drawn),
            continued=st.lists(st.booleans(), min_size=len(drawn), max_size=len(drawn)),
            padding=st.integers(0 if any(drawn) else 1, 3),
            channels=st.sampled_from([16, 144, 272]),
            taps=st.sampled_from([2, 3, 4]),
            dtype=st.sampled_from([torch.float32, torch.float16, torch.bfloat16]),
        )
    )


def tensors(case: Case) -> list[torch.Tensor]:
    """Inputs in SPEC order, NaN where the op must not read: padding tokens, new sequences' rows, free rows."""
    generator = torch.Generator().manual_seed(0)
    num_tokens, num_sequences = sum(case.lengths), len(case.lengths)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator).to(case.dtype)

    x = torch.cat([normal(num_tokens, case.channels), torch.full((case.padding, case.channels), torch.nan)])
    slot = torch.randperm(num_sequences + 2, generator=generator)[:num_sequences]
    conv_state = torch.full((num_sequences + 2, case.channels, case.taps - 1), torch.nan)
    context_len = torch.tensor(case.continued, dtype=torch.int32) * 7
    conv_state[slot] = normal(num_sequences, case.channels, case.taps - 1).float()
    conv_state[slot[context_len == 0]] = torch.nan
    query_start = torch.tensor([0, *case.lengths]).cumsum(0).int()
    weight, bias = normal(case.channels, case.taps), normal(case.channels)
    return [
        *(x.to(case.dtype), weight, bias, conv_state.to(case.dtype)),
        *(query_start, context_len, slot.int()),
    ]


def bits(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.view({2: torch.int16, 4: torch.int32}[tensor.element_size()])


def check(case: Case, reverse: bool = False) -> None:
    inputs = tensors(case)
    expected_y, expected_state = reference(*inputs)
    sizes = SPEC.sizes([tuple(tensor.shape) for tensor in inputs])
    dtype = str(case.dtype).removeprefix("torch.")
    buffers = dict(zip([tensor.name for tensor in SPEC.inputs], inputs, strict=True))
    buffers |= {"conv_state": inputs[3].clone(), "y": torch.full_like(inputs[0], torch.nan)}
    plan = kernels.launches(sizes, {"X": dtype}, 90)
    with interpreting():
        kernels.execute(plan[::-1] if reverse else plan, buffers)

    y, used = buffers["y"], sum(case.lengths)
    error = (y[:used].double() - expected_y[:used].double()).norm()
    assert error <= SPEC.tolerances[dtype].relative_l2 * expected_y.double().norm()
    assert torch.equal(bits(y[used:]), bits(torch.zeros_like(y[used:])))
    assert torch.equal(bits(buffers["conv_state"]), bits(expected_state))


@settings(max_examples=40, deadline=None, derandomize=True, database=None)
@given(steps(st.lists(LENGTHS, min_size=1, max_size=4)), st.booleans())
def test_any_mixture(case: Case, reverse: bool) -> None:
    check(case, reverse)


@settings(max_examples=40, deadline=None, derandomize=True, database=None)
@given(steps(st.lists(st.sampled_from([0, 0, 0, 1, 1, 2, 5]), min_size=6, max_size=9)))
def test_decode_shaped_steps_of_any_lengths(case: Case) -> None:
    check(case)


def test_decode_of_one_token_each() -> None:
    check(Case([1] * 5, [True, False, True, True, False], 0, 272, 4, torch.bfloat16))


def test_a_padded_decode_step() -> None:
    check(Case([1, 1, 0, 0], [True, True, False, True], 2, 272, 4, torch.float16))


def test_a_sequence_over_three_blocks_between_short_ones() -> None:
    check(Case([1, 2 * BLOCK_T + 9, 2, 1], [True, True, True, False], 1, 144, 4, torch.float16))


def test_scratch_may_be_shared() -> None:
    inputs = tensors(Case([1, 1, 1, 1], [True, False, False, False], 0, 16, 4, torch.float16))
    inputs[6][1:] = 0
    expected_y, expected_state = reference(*inputs)
    y, state = kernels.run(*inputs)
    torch.testing.assert_close(y, expected_y, rtol=2e-3, atol=2e-3)
    assert torch.equal(bits(state[1:]), bits(expected_state[1:]))


def test_run_is_functional_and_repeatable() -> None:
    inputs = tensors(Case([BLOCK_T + 5, 0, 2], [True, True, False], 2, 144, 4, torch.bfloat16))
    copies = [tensor.clone() for tensor in inputs]
    first, second = kernels.run(*inputs), kernels.run(*inputs)
    assert all(torch.equal(bits(a), bits(b)) for a, b in zip(first, second, strict=True))
    assert all(torch.equal(bits(a), bits(b)) for a, b in zip(inputs, copies, strict=True))


def test_shapes_alone_pick_the_launches() -> None:
    sizes = {"T": 64, "B": 64, "C": 10240, "K": 4, "S": 65, "K-1": 3, "B+1": 65}
    (decode,) = kernels.launches(sizes, {"X": "bfloat16"}, 90)
    assert (decode.variant.kernel, decode.grid) == ("conv_sequences", (80, 64, 1))
    assert decode.integers == {"T": 64, "B": 64, "C": 10240, "walk": 64}
    starts, bulk = kernels.launches(sizes | {"T": 8192}, {"X": "bfloat16"}, 90)
    assert starts.integers["walk"] == 3
    assert (bulk.variant.kernel, bulk.grid) == ("conv_tokens", (80, 128, 1))


@pytest.mark.parametrize("sm", SMS)
def test_every_launch_is_a_listed_variant(sm: int) -> None:
    listed = list(kernels.variants(sm))
    assert len({variant.name for variant in listed}) == len(listed)
    sizes = {"B": 2, "C": 32, "S": 3}
    for dtype in SPEC.dtypes["X"]:
        for taps in kernels.FAMILY_TAPS:
            for tokens in (1, 100):
                plan = kernels.launches(sizes | {"T": tokens, "K": taps}, {"X": dtype}, sm)
                assert all(launch.variant in listed for launch in plan)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"K": 5}, "K to be one of 2, 3, 4, got 5"),
        ({"C": 20}, "C to be a multiple of 16, got 20"),
        ({"T": 0}, "T to be from 1 to 2147483647, got 0"),
        ({"B": 70000}, "B to be from 1 to 65535, got 70000"),
    ],
)
def test_refusals_name_the_op_and_the_size(change: dict[str, int], message: str) -> None:
    with pytest.raises(ValueError, match=f"NemoCausalConv1d: .*{message}"):
        kernels.supports({"T": 4, "B": 2, "C": 32, "K": 4} | change, {"X": "float16"}, 90)


def test_refusals_of_a_dtype_and_an_sm() -> None:
    sizes = {"T": 4, "B": 2, "C": 32, "K": 4}
    with pytest.raises(
        ValueError, match=r"NemoCausalConv1d: the kernels require X to be one of .*, got float64"
    ):
        kernels.supports(sizes, {"X": "float64"}, 90)
    with pytest.raises(
        ValueError, match=r"NemoCausalConv1d: the kernels require the SM to be one of .*, got 75"
    ):
        kernels.supports(sizes, {"X": "float16"}, 75)
