"""The experts' kernels match the reference in Triton's interpreter."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from interpreter import interpreting
from moe_cases import CHUNK, DTYPES, Case, bits, block_rows, cases, executed, kernels, tensors
from triton.runtime.interpreter import InterpreterBuilder, TensorHandle

from nemotrt.plugins.moe_dispatch.reference import _quantized, reference, route


def assert_close(case: Case, y: torch.Tensor, expected: torch.Tensor) -> None:
    error = (y.double() - expected.double()).norm()
    assert error <= case.tolerance * expected.double().norm()


def check(case: Case) -> None:
    inputs = tensors(case)
    first, second = executed(case, inputs, 0x7F), executed(case, inputs, 0xFF)
    assert torch.equal(bits(first["y"]), bits(second["y"]))
    assert_close(case, first["y"], reference(*inputs, **case.attributes)[0])


@settings(max_examples=50, deadline=None, derandomize=True, database=None)
@given(cases())
def test_any_step(case: Case) -> None:
    check(case)


@pytest.mark.parametrize(("X", "W"), DTYPES)
def test_some_rows_an_expert(X: str, W: str) -> None:
    case = Case(T=43, R=4, E=3, top_k=2, first_expert=1, L=80, I=144, X=X, W=W)
    assert block_rows(case) == 64
    check(case)


@pytest.mark.parametrize(
    ("X", "W", "I"),
    [("bfloat16", "bfloat16", 256), ("float16", "float16", 144), ("float16", "float8_e4m3fn", 144)],
)
def test_many_rows_an_expert_in_more_than_one_chunk(X: str, W: str, I: int) -> None:  # noqa: E741
    case = Case(T=CHUNK + 5, R=2, E=2, top_k=2, I=I, X=X, W=W)
    assert block_rows(case) == 128
    check(case)


@pytest.mark.parametrize("routing", ["random", "one expert"])
def test_few_rows_an_expert_over_two_chunks(routing: str) -> None:
    case = Case(T=CHUNK + 9, R=20, E=17, top_k=2, first_expert=1, I=16, logits=routing)
    assert block_rows(case) == 16
    check(case)


def test_more_experts_than_a_narrow_router_has() -> None:
    check(Case(T=6, R=131, E=131, top_k=22, I=16, X="bfloat16", W="bfloat16"))


@settings(max_examples=40, deadline=None, derandomize=True, database=None)
@given(cases())
def test_routing_is_the_references(case: Case) -> None:
    case = replace(case, X="float32", W="float32")
    inputs = tensors(case)
    values = executed(case, inputs, stages="route")
    attributes = {key: value for key, value in case.attributes.items() if key != "first_expert"}
    chosen_Tk, weights_Tk = route(inputs[1], inputs[2], **attributes)
    here_Tk = chosen_Tk - case.first_expert
    here_Tk[(here_Tk < 0) | (here_Tk >= case.E)] = -1
    assert values["experts"].view_as(here_Tk).tolist() == here_Tk.tolist()
    torch.testing.assert_close(values["weights"].view_as(weights_Tk), weights_Tk, rtol=1e-6, atol=0)


@settings(max_examples=40, deadline=None, derandomize=True, database=None)
@given(cases(), st.sampled_from([2, 3, 20, CHUNK - 1, CHUNK, CHUNK + 3, 3 * CHUNK]), st.booleans())
def test_rows_are_sorted_by_expert_then_token(case: Case, T: int, same_for_all: bool) -> None:
    case = replace(case, T=T, first_expert=0, X="float32", W="float32")
    generator = torch.Generator().manual_seed(case.seed)
    order_TR = torch.rand(1 if same_for_all else T, case.R, generator=generator).argsort(1).expand(T, -1)
    ranks = torch.zeros(
        kernels.scratch(vars(case), case.attributes, case.dtypes)["ranks"].shape, dtype=torch.int8
    )
    ranks.scatter_(
        1, order_TR[:, : case.top_k], torch.arange(1, case.top_k + 1, dtype=torch.int8).expand(T, -1)
    )
    ranks[:, case.E :] = 0
    values = executed(case, tensors(case), stages="count place", ranks=ranks)
    chosen = torch.where(order_TR < case.E, order_TR, -1)[:, : case.top_k].flatten().tolist()
    expected = sorted(
        (slot for slot, expert in enumerate(chosen) if expert >= 0), key=lambda s: (chosen[s], s)
    )
    assert values["slots"].tolist()[: len(expected)] == expected

    covered = []
    blocks = values["blocks"].flatten()[: 3 * values["max_blocks"]].view(3, -1).T.tolist()
    for expert, first, rows in blocks:
        assert expert == -1 or 1 <= rows <= values["block_rows"]
        covered += [(expert, row) for row in range(first, first + rows)] if expert >= 0 else []
    assert covered == [(chosen[slot], row) for row, slot in enumerate(expected)]


def test_nan_logits_choose_some_expert() -> None:
    case = Case(T=3, norm_topk_prob=0)
    inputs = tensors(case)
    inputs[1][1, 3:6] = torch.nan
    chosen = executed(case, inputs, stages="route")["experts"].view(3, 2)
    assert chosen[1].tolist() == [3, 4]


@pytest.mark.parametrize(("X", "W"), [("float16", "float16"), ("bfloat16", "float8_e4m3fn")])
@pytest.mark.parametrize("wrong", [torch.nan, torch.inf])
def test_a_token_that_is_not_finite_harms_no_other(X: str, W: str, wrong: float) -> None:
    case = Case(T=20, X=X, W=W)
    inputs = tensors(case)
    clean = executed(case, inputs)["y"]
    inputs[0][7, 3] = wrong
    y = executed(case, inputs)["y"]
    others = torch.arange(case.T) != 7
    assert torch.equal(bits(y[others]), bits(clean[others]))
    assert torch.equal(y[7].isnan(), reference(*inputs, **case.attributes)[0][7].isnan())


@pytest.mark.parametrize(("X", "W"), DTYPES)
def test_a_token_alone_is_what_it_is_among_others(X: str, W: str) -> None:
    case = Case(T=9, R=6, E=4, first_expert=1, top_k=3, L=144, I=80, X=X, W=W)
    inputs = tensors(case)
    together = executed(case, inputs)["y"]
    alone = [
        executed(replace(case, T=1), [inputs[0][t : t + 1], inputs[1][t : t + 1], *inputs[2:]])["y"]
        for t in range(case.T)
    ]
    assert_close(case, torch.cat(alone), together)


@pytest.fixture
def fused_multiply_add(monkeypatch: pytest.MonkeyPatch) -> None:
    """A multiply-add with one rounding, as on a GPU; the interpreter would round the product too. FP64 is exact."""

    def fma(self: Any, x: Any, y: Any, z: Any) -> TensorHandle:
        exact = x.data.astype(np.float64) * y.data + z.data
        return TensorHandle(exact.astype(np.float32), z.dtype.scalar)

    monkeypatch.setattr(InterpreterBuilder, "create_fma", fma)


@pytest.mark.usefixtures("fused_multiply_add")
@pytest.mark.parametrize("X", ["float32", "float16", "bfloat16"])
@pytest.mark.parametrize("hidden_scale", [0.03, 0.3, 0.5, 0.0137])
def test_fp8_activations_are_the_references_to_the_bit(X: str, hidden_scale: float) -> None:
    """Sums of few integers are exact in any order, so that only rounding and saturation could differ."""
    case = Case(T=33, R=2, E=2, top_k=1, L=48, I=80, X=X, W="float8_e4m3fn")
    inputs = tensors(case)
    generator = torch.Generator().manual_seed(1)
    inputs[0] = torch.randint(-900, 901, (case.T, case.L), generator=generator).to(inputs[0].dtype)
    inputs[3] = torch.randint(-3, 4, (case.E, case.I, case.L), generator=generator).to(inputs[3].dtype)
    inputs[5] = 2.0 ** torch.randint(-10, 1, (case.E, case.I), generator=generator)
    inputs[7:9] = (torch.tensor([scale]) for scale in (2.0, hidden_scale))
    values = executed(case, inputs, stages="route_and_quantize place up")

    x_fp8 = _quantized(inputs[0], inputs[7])
    assert torch.equal(values["x_fp8"].float() * inputs[7], x_fp8)
    token_S = values["slots"].long()
    expert_S = values["experts"].long()[token_S]
    sums_SI = torch.einsum("sl,sil->si", x_fp8[token_S], inputs[3].float()[expert_S])
    hidden = (sums_SI * inputs[5][expert_S]).relu().square().to(inputs[0].dtype)
    assert torch.equal(values["hidden"].float() * inputs[8], _quantized(hidden, inputs[8]))


def test_parts_are_added_in_the_order_of_rank() -> None:
    T, k, L = 3, 22, 16
    generator = torch.Generator().manual_seed(0)
    parts_TkL = torch.randn(T, k, L, generator=generator) * 10.0 ** torch.arange(k).remainder(7)[:, None]
    weights_Tk = torch.rand(T, k, generator=generator)
    experts_Tk = torch.randint(-1, 3, (T, k), generator=generator, dtype=torch.int32)
    parts_TkL[experts_Tk < 0] = torch.nan
    y = torch.empty(T, L)
    with interpreting():
        kernels.combine_kernel[(T, 1)](
            parts_TkL, experts_Tk, weights_Tk, y, L, k, BLOCK_TOP_K=32, BLOCK_L=512
        )
    expected = torch.zeros(T, L)
    for rank in range(k):
        here_T = (experts_Tk[:, rank] >= 0)[:, None]
        expected += torch.where(here_T, weights_Tk[:, rank, None] * parts_TkL[:, rank], 0.0)
    assert torch.equal(y, expected)
    assert not torch.equal(
        y, torch.where(parts_TkL.isnan(), 0, parts_TkL * weights_Tk[..., None]).flip(1).sum(1)
    )


@pytest.mark.parametrize(("X", "W"), DTYPES)
def test_run_takes_and_gives_what_the_reference_does(X: str, W: str) -> None:
    case = Case(X=X, W=W)
    inputs = tensors(case)
    copies = [tensor.clone() for tensor in inputs]
    (y,) = kernels.run(*inputs, **case.attributes)
    (expected,) = reference(*inputs, **case.attributes)
    assert (y.shape, y.dtype) == (expected.shape, expected.dtype)
    assert_close(case, y, expected)
    assert all(torch.equal(bits(a), bits(b)) for a, b in zip(inputs, copies, strict=True))


def test_no_tokens() -> None:
    case = Case(T=0)
    assert kernels.run(*tensors(case), **case.attributes)[0].shape == (0, case.L)


def test_inputs_with_gaps_are_refused() -> None:
    case = Case()
    inputs = tensors(case)
    inputs[0] = torch.randn(case.L, case.T).T
    with pytest.raises(ValueError, match=r"NemoMoeDispatch: x is not contiguous"):
        kernels.run(*inputs, **case.attributes)
