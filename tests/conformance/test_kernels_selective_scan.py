"""The scan's kernels match the reference in Triton's interpreter."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from interpreter import interpreted, interpreting

from nemotrt.plugins.selective_scan import SPEC
from nemotrt.plugins.selective_scan.reference import reference
from nemotrt.plugins.variant import SMS

kernels = interpreted("nemotrt.plugins.selective_scan.kernels")
STEP = kernels.STEP_TOKENS
FEW = settings(max_examples=16, deadline=None, derandomize=True, database=None)
HEADS = [(64, 128), (80, 128), (64, 256)]
"""P and N of the family."""


@dataclass(frozen=True)
class Case:
    """A step: each sequence's length and whether it continues, the number of padding tokens, and the other sizes.

    `decay` says how tokens forget: as a trained model's, all slowly, all wholly, or one, then the other.
    """

    lengths: list[int]
    continued: list[bool]
    padding: int = 0
    heads: int = 2
    groups: int = 1
    head: tuple[int, int] = (64, 128)
    X: str = "float16"
    STATE: str = "float32"
    decay: str = "model"
    size: float = 1.0
    sm: int = 90
    dt_limit: tuple[float, float] = (0.0, math.inf)

    @property
    def dtypes(self) -> dict[str, str]:
        return {"X": self.X, "STATE": self.STATE}

    @property
    def limits(self) -> dict[str, float]:
        return dict(zip(("dt_min", "dt_max"), self.dt_limit, strict=True))


def steps(lengths: st.SearchStrategy[list[int]]) -> st.SearchStrategy[Case]:
    return lengths.flatmap(
        lambda drawn: st.builds(
            lambda dtypes, shape, **named: Case(
                drawn, X=dtypes[0], STATE=dtypes[1], heads=shape[0], groups=shape[1], **named
            ),
            dtypes=st.sampled_from(kernels.DTYPES),
            shape=st.sampled_from([(1, 1), (2, 1), (2, 2), (3, 1)]),
            continued=st.lists(st.booleans(), min_size=len(drawn), max_size=len(drawn)),
            padding=st.integers(0 if any(drawn) else 1, 3),
            head=st.sampled_from(HEADS),
            decay=st.sampled_from(["model", "model", "slow", "erase", "mixed"]),
            sm=st.sampled_from([89, 90]),
        )
    )


def delta_logits(case: Case, normal: torch.Tensor) -> torch.Tensor:
    """Raw Δ [T, H]; with A between −16 and −1, a Δ of 60 leaves 2^−80 of the state and less."""
    token = torch.arange(normal.shape[0])[:, None]
    slow, whole = normal - 4, normal + 60
    return {
        "model": normal,
        "slow": slow,
        "erase": whole,
        "erase, then slow": torch.where(token % 64 < 40, whole, torch.full_like(slow, -0.5)),
        "mixed": torch.where(token * 7 % 11 < 4, whole, slow),
    }[case.decay]


def tensors(case: Case) -> list[torch.Tensor]:
    """Inputs in SPEC order, NaN where the op must not read: padding tokens, new sequences' rows, free rows."""
    generator = torch.Generator().manual_seed(0)
    num_tokens, num_sequences = sum(case.lengths), len(case.lengths)
    P, N = case.head

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator)

    def tokens(values: torch.Tensor) -> torch.Tensor:
        padding = torch.full((case.padding, *values.shape[1:]), torch.nan)
        return torch.cat([values, padding]).to(getattr(torch, case.X))

    slot = torch.randperm(num_sequences + 2, generator=generator)[:num_sequences]
    state = torch.full((num_sequences + 2, case.heads, P, N), torch.nan)
    context_len = torch.tensor(case.continued, dtype=torch.int32) * 7
    state[slot] = normal(num_sequences, case.heads, P, N)
    state[slot[context_len == 0]] = torch.nan
    return [
        tokens(normal(num_tokens, case.heads, P) * case.size),
        tokens(delta_logits(case, normal(num_tokens, case.heads))),
        -(1 + 15 * torch.rand(case.heads, generator=generator)),
        *(tokens(normal(num_tokens, case.groups, N)), tokens(normal(num_tokens, case.groups, N))),
        *(normal(case.heads), normal(case.heads) - 4),
        state.to(getattr(torch, case.STATE)),
        torch.tensor([0, *case.lengths]).cumsum(0).int(),
        *(context_len, slot.int()),
    ]


def bits(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.contiguous().view(torch.uint8)


def executed(case: Case, inputs: list[torch.Tensor], reverse: bool = False) -> dict[str, torch.Tensor]:
    """All buffers after the launches, in either order of those that may overlap; y and scratch start as NaN."""
    sizes = SPEC.sizes([tuple(tensor.shape) for tensor in inputs])
    buffers = dict(zip([tensor.name for tensor in SPEC.inputs], inputs, strict=True))
    buffers |= {"ssm_state": inputs[7].clone(), "y": torch.full_like(inputs[0], torch.nan)}
    for name, (dtype, shape) in kernels.workspace(sizes, case.dtypes, case.sm).items():
        buffers[name] = torch.full(shape, torch.nan, dtype=getattr(torch, dtype))
    plan = kernels.launches(sizes, case.dtypes, case.sm)
    if reverse:  # the sequences of few tokens before those of many, whose chunks must be prepared first
        plan = [*plan[2:], *plan[:2]]
    with interpreting():
        kernels.execute(plan, buffers, *case.dt_limit)
    return buffers


def relative(actual: torch.Tensor, expected: torch.Tensor) -> float:
    difference = (actual.double() - expected.double()).norm()
    return float(difference / expected.double().norm()) if difference else 0.0


def check(case: Case, reverse: bool = False) -> None:
    inputs = tensors(case)
    buffers = executed(case, inputs, reverse)
    expected_y, expected_state = reference(*inputs, **case.limits)
    y, state, used = buffers["y"], buffers["ssm_state"], sum(case.lengths)
    y_limit = SPEC.tolerances[case.X].relative_l2
    state_limit = max(y_limit, SPEC.tolerances[case.STATE].relative_l2)
    # Heads forget at different rates, and sequences start anew: each is judged for itself.
    for b, (start, end) in enumerate(pairwise(inputs[8].tolist())):
        row = int(inputs[10][b])
        for head in range(case.heads if end > start else 0):
            where = f"sequence {b}, head {head} of {case}"
            assert relative(y[start:end, head], expected_y[start:end, head]) <= y_limit, f"y: {where}"
            assert relative(state[row, head], expected_state[row, head]) <= state_limit, f"state: {where}"
    written = {int(inputs[10][b]) for b, length in enumerate(case.lengths) if length}
    kept = [row for row in range(state.shape[0]) if row not in written]
    assert torch.equal(bits(state[kept]), bits(inputs[7][kept]))
    assert torch.equal(bits(y[used:]), bits(torch.zeros_like(y[used:])))


@FEW
@given(steps(st.lists(st.sampled_from([0, 1, 3, STEP + 1, 33, 64]), min_size=1, max_size=3)), st.booleans())
def test_any_mixture(case: Case, reverse: bool) -> None:
    check(case, reverse)


@FEW
@given(steps(st.tuples(st.integers(STEP + 1, 140)).map(list)))
def test_one_sequence_of_any_length(case: Case) -> None:
    check(case)


@FEW
@given(steps(st.lists(st.sampled_from([0, 0, 0, 1, 1, 2, 5]), min_size=4, max_size=6)))
def test_decode_shaped_steps_of_any_lengths(case: Case) -> None:
    check(case)


@pytest.mark.parametrize(("X", "STATE"), kernels.DTYPES, ids=str)
@pytest.mark.parametrize("head", HEADS, ids=str)
def test_decode_of_one_token_each(X: str, STATE: str, head: tuple[int, int]) -> None:
    check(Case([1, 1], [True, False], groups=2, head=head, X=X, STATE=STATE))


@pytest.mark.parametrize(("X", "STATE"), kernels.DTYPES, ids=str)
@pytest.mark.parametrize("head", HEADS, ids=str)
def test_prefill_among_decodes(X: str, STATE: str, head: tuple[int, int]) -> None:
    check(Case([1, 70, 1], [True, True, False], padding=2, head=head, X=X, STATE=STATE))


@pytest.mark.parametrize("decay", ["slow", "erase", "erase, then slow", "mixed"])
@pytest.mark.parametrize("X", kernels.CHUNKED)
@pytest.mark.parametrize("sm", [89, 90])
def test_tokens_that_erase_and_tokens_that_keep(decay: str, X: str, sm: int) -> None:
    check(Case([64, 150], [True, False], X=X, decay=decay, sm=sm))


@pytest.mark.parametrize("size", [1e-4, 300.0])
def test_fp16_neither_overflows_nor_vanishes(size: float) -> None:
    check(Case([90], [True], decay="slow", size=size))
    check(Case([90], [False], decay="slow", size=size, head=(80, 128)))


def test_wide_pieces_of_many_heads() -> None:
    case = Case([STEP + 1], [True], heads=kernels.FULL_GPU, groups=8)
    sizes = SPEC.sizes([tuple(tensor.shape) for tensor in tensors(case)])
    assert kernels.launches(sizes, case.dtypes, 90)[1].variant.constants["P"] == 64
    check(case)


def test_groups_of_several_heads() -> None:
    check(Case([40], [True], heads=8, groups=2, head=(64, 256)))
    check(Case([1, 1], [True, True], heads=8, groups=4))


def test_steps_are_clamped() -> None:
    for lengths in ([70], [1]):
        check(Case(lengths, [True], dt_limit=(0.02, 0.1)))


def test_a_padded_decode_step() -> None:
    check(Case([1, 1, 0, 0], [True, True, False, True], padding=2, X="bfloat16"))


def test_more_long_sequences_than_programs_for_them(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernels, "WALKERS", 1)
    case = Case([9, 1, 12, 0, 9], [True, False, False, True, True])
    sizes = SPEC.sizes([tuple(tensor.shape) for tensor in tensors(case)])
    assert kernels.launches(sizes, case.dtypes, 90)[1].grid == (4, 1, 1)
    check(case)


def test_more_sequences_than_are_searched_at_once() -> None:
    lengths = [0, 1] * 70 + [10, 0, 9]
    check(Case(lengths, [True] * len(lengths), heads=1))


def test_scratch_may_be_shared() -> None:
    case = Case([1, 1, 1], [True, False, False])
    inputs = tensors(case)
    inputs[10][1:] = 0
    expected_y, expected_state = reference(*inputs, **case.limits)
    y, state = kernels.run(*inputs, **case.limits)
    torch.testing.assert_close(y, expected_y, rtol=2e-3, atol=2e-3)
    row = int(inputs[10][0])
    torch.testing.assert_close(state[row], expected_state[row], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("X", kernels.CHUNKED)
def test_a_nan_stays_in_its_sequence(X: str) -> None:
    case = Case([12, 20, 1, 10], [True, False, True, True], X=X, groups=2)
    clean, inputs = tensors(case), tensors(case)
    inputs[0][15, 0, 3] = torch.nan
    expected, found = (executed(case, given) for given in (clean, inputs))
    others = [token for token in range(43) if not 12 <= token < 32]
    assert torch.equal(bits(found["y"][others]), bits(expected["y"][others]))
    rows = [int(inputs[10][b]) for b in (0, 2, 3)]
    assert torch.equal(bits(found["ssm_state"][rows]), bits(expected["ssm_state"][rows]))
    assert found["y"][15, 0].isnan().any()
    assert found["ssm_state"][int(inputs[10][1]), 0, 3].isnan().all()


@pytest.mark.parametrize("lengths", [[70, 0, 2], [1, 0, 1]])
@pytest.mark.parametrize("X", kernels.CHUNKED)
def test_run_is_functional_and_repeatable(lengths: list[int], X: str) -> None:
    case = Case(lengths, [True, True, False], padding=1, X=X, STATE="float16")
    inputs = tensors(case)
    copies = [tensor.clone() for tensor in inputs]
    first, second = (kernels.run(*inputs, **case.limits) for _ in range(2))
    assert all(torch.equal(bits(a), bits(b)) for a, b in zip(first, second, strict=True))
    assert all(torch.equal(bits(a), bits(b)) for a, b in zip(inputs, copies, strict=True))


SIZES = {"T": 64, "B": 64, "H": 128, "P": 64, "G": 8, "N": 128, "S": 65}


def test_shapes_alone_pick_the_launches() -> None:
    dtypes = {"X": "bfloat16", "STATE": "float32"}
    (decode,) = kernels.launches(SIZES, dtypes, 90)
    assert (decode.variant.kernel, decode.grid) == ("step_sequences", (256, 64, 1))
    assert decode.integers["step_tokens"] == 64
    prepare, scan, step = kernels.launches(SIZES | {"T": 8192, "B": 1}, dtypes, 90)
    assert (prepare.variant.kernel, prepare.grid) == ("prepare_chunks", (130, 8, 1))
    assert (scan.variant.kernel, scan.grid) == ("scan_sequences", (128, 1, 1))
    assert step.integers["step_tokens"] == scan.integers["step_tokens"] == STEP
    assert len(kernels.launches(SIZES | {"T": 8192}, dtypes | {"X": "float32"}, 90)) == 1


@settings(max_examples=200, deadline=None, derandomize=True, database=None)
@given(st.integers(1, 3000), st.integers(1, 90), st.sampled_from(["T", "B"]), st.sampled_from(SMS))
def test_workspace_grows(T: int, B: int, grown: str, sm: int) -> None:
    dtypes = {"X": "float16", "STATE": "float32"}
    sizes = SIZES | {"T": T + B + STEP, "B": B}
    smaller = kernels.workspace(sizes, dtypes, sm)
    if kernels.is_step(sizes | {grown: sizes[grown] + 1}, dtypes):
        return
    larger = kernels.workspace(sizes | {grown: sizes[grown] + 1}, dtypes, sm)
    assert all(math.prod(larger[name][1]) >= math.prod(shape) for name, (_, shape) in smaller.items())


@pytest.mark.parametrize("sm", SMS)
def test_every_launch_is_a_listed_variant(sm: int) -> None:
    listed = list(kernels.variants(sm))
    assert len({variant.name for variant in listed}) == len(listed)
    used = set()
    for X, STATE in kernels.DTYPES:
        for P, N in HEADS:
            for change in ({"T": 1}, {"T": 9999}, {"T": 9999, "H": 16}):
                sizes = SIZES | {"P": P, "N": N} | change
                for launch in kernels.launches(sizes, {"X": X, "STATE": STATE}, sm):
                    assert launch.variant in listed
                    used.add(launch.variant.name)
    assert used == {variant.name for variant in listed}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"N": 64}, "N to be one of 128, 256, got 64"),
        ({"P": 48}, "P to be a multiple of 32, or 80 with N 128, got 48 with N 128"),
        ({"P": 80, "N": 256}, "got 80 with N 256"),
        ({"G": 3}, "H to be a multiple of 3, got 128"),
        ({"T": 0}, "T to be from 1 to 2147483647, got 0"),
        ({"B": 70000}, "B to be from 1 to 65535, got 70000"),
    ],
)
def test_refusals_name_the_op_and_the_size(change: dict[str, int], message: str) -> None:
    with pytest.raises(ValueError, match=f"NemoSelectiveScan: .*{message}"):
        kernels.supports(SIZES | change, {"X": "float16", "STATE": "float32"}, 90)


def test_refusals_of_dtypes_and_sms() -> None:
    with pytest.raises(ValueError, match=r"NemoSelectiveScan: .*got \(float32, float16\)"):
        kernels.supports(SIZES, {"X": "float32", "STATE": "float16"}, 90)
    with pytest.raises(
        ValueError, match=r"NemoSelectiveScan: the kernels require the SM to be one of .*, got 75"
    ):
        list(kernels.variants(75))
    inputs = tensors(replace(Case([1], [True]), X="bfloat16"))
    inputs[3] = inputs[3].half()
    with pytest.raises(ValueError, match="NemoSelectiveScan: B is float16, expected bfloat16"):
        kernels.run(*inputs, dt_min=0.0, dt_max=math.inf)
