"""The experts' kernels match the reference in Triton's interpreter."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from interpreter import interpreted, interpreting
from triton.runtime.interpreter import InterpreterBuilder, TensorHandle

from nemotrt.plugins.cubin import compile_variant
from nemotrt.plugins.moe_dispatch import SPEC
from nemotrt.plugins.moe_dispatch.reference import _quantized, reference, route
from nemotrt.plugins.variant import SMS, supports_fp8

kernels = interpreted("nemotrt.plugins.moe_dispatch.kernels")
CHUNK = kernels.CHUNK_TOKENS

DTYPES = [
    *((dtype, dtype) for dtype in ("float32", "float16", "bfloat16")),
    *((dtype, "float8_e4m3fn") for dtype in ("float32", "float16", "bfloat16")),
]
"""x's dtype and the weights'."""


@dataclass(frozen=True)
class Case:
    """Sizes, attributes, dtypes, and the kind of router logits."""

    T: int = 5
    L: int = 16
    R: int = 8
    E: int = 8
    I: int = 32  # noqa: E741
    top_k: int = 2
    num_groups: int = 1
    topk_group: int = 1
    norm_topk_prob: int = 1
    routed_scaling_factor: float = 2.5
    first_expert: int = 0
    X: str = "float32"
    W: str = "float32"
    logits: str = "random"
    seed: int = 0

    @property
    def attributes(self) -> dict[str, Any]:
        return {name: getattr(self, name) for name in SPEC.attributes}

    @property
    def dtypes(self) -> dict[str, str]:
        return {"X": self.X, "W": self.W}

    @property
    def tolerance(self) -> float:
        return SPEC.tolerances[self.W].relative_l2


@st.composite
def cases(draw: st.DrawFn) -> Case:
    num_groups, group_size = draw(st.sampled_from([1, 1, 2, 3, 4])), draw(st.integers(1, 4))
    R = num_groups * group_size
    X, W = draw(st.sampled_from(DTYPES))
    return Case(
        T=draw(st.sampled_from([1, 1, 2, 3, 7, 17])),
        L=draw(st.sampled_from([16, 48, 144])),
        R=R,
        E=draw(st.integers(1, R)),
        I=draw(st.sampled_from([16, 80, 144])),
        top_k=draw(st.integers(1, min(R, 5))),
        num_groups=num_groups,
        topk_group=draw(st.integers(1, num_groups)),
        norm_topk_prob=draw(st.sampled_from([0, 1])),
        routed_scaling_factor=draw(st.sampled_from([1.0, 2.5])),
        first_expert=draw(st.integers(0, R)),
        X=X,
        W=W,
        logits=draw(st.sampled_from(["random", "ties", "all equal", "one expert", "saturated"])),
        seed=draw(st.integers(0, 2**31)),
    )


def logits(case: Case, normal: torch.Tensor) -> torch.Tensor:
    """Logits [T, R]: of any kind, with ties, or sending every token to the same experts."""
    descending_R = torch.arange(case.R, 0, -1.0)
    return {
        "random": normal,
        "ties": normal.round(),
        "all equal": torch.zeros_like(normal),
        "one expert": normal.sign() * 1e-2 + descending_R,
        "saturated": normal.sign() * 40.0,
    }[case.logits]


def tensors(case: Case) -> list[torch.Tensor]:
    """Inputs in SPEC order."""
    generator = torch.Generator().manual_seed(case.seed)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator)

    X, W = (getattr(torch, dtype) for dtype in (case.X, case.W))
    correction_bias = normal(case.R).round() / 8 if case.logits != "random" else normal(case.R) / 8
    return [
        normal(case.T, case.L).to(X),
        logits(case, normal(case.T, case.R)),
        correction_bias,
        (normal(case.E, case.I, case.L) * case.L**-0.5).to(W),
        (normal(case.E, case.L, case.I) * case.I**-0.5).to(W),
        torch.rand(case.E, case.I, generator=generator) + 0.5,
        torch.rand(case.E, case.L, generator=generator) + 0.5,
        torch.tensor([0.0061]),  # x up to ±2.7: a few saturate
        torch.tensor([0.02]),
    ]


def bits(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.contiguous().view(torch.uint8)


def poisoned(shape: tuple[int, ...], dtype: str, byte: int) -> torch.Tensor:
    tensor = torch.empty(shape, dtype=getattr(torch, dtype))
    bits(tensor).fill_(byte)
    return tensor


def executed(
    case: Case, inputs: list[torch.Tensor], byte: int = 0x7F, stages: str = "", **given: torch.Tensor
) -> dict[str, torch.Tensor | Any]:
    """All that the launches (of these stages, where any are named) were given, after them.

    Scratch and y, unless given, start as this byte, repeated: 0x7F is NaN in FP8 and FP16, 3.4e38 in BF16 and
    FP32, and no index at all; 0xFF is NaN and −1.
    """
    dims = SPEC.sizes([tuple(tensor.shape) for tensor in inputs])
    values: dict[str, Any] = {spec.name: tensor for spec, tensor in zip(SPEC.inputs, inputs, strict=True)}
    values |= dims | case.attributes | kernels.derived(dims, case.attributes, case.dtypes, 90)
    for name, buffer in kernels.scratch(dims, case.attributes, case.dtypes).items():
        values[name] = poisoned(buffer.shape, buffer.dtype, byte)
    values |= {"y": poisoned((case.T, case.L), case.X, byte)} | given
    plan = kernels.launches(dims, case.attributes, case.dtypes, 90)
    names = {f"{stage}_kernel" for stage in stages.split()}
    with interpreting():
        kernels.execute([step for step in plan if not names or step.variant.kernel in names], values)
    return values


def assert_close(case: Case, y: torch.Tensor, expected: torch.Tensor) -> None:
    error = (y.double() - expected.double()).norm()
    assert error <= case.tolerance * expected.double().norm()


def check(case: Case) -> None:
    inputs = tensors(case)
    first, second = executed(case, inputs, 0x7F), executed(case, inputs, 0xFF)
    assert torch.equal(bits(first["y"]), bits(second["y"]))
    assert_close(case, first["y"], reference(*inputs, **case.attributes)[0])


def block_rows(case: Case, sm: int = 90) -> int:
    dims = {axis: getattr(case, axis) for axis in "TLREI"}
    return int(kernels.derived(dims, case.attributes, case.dtypes, sm)["block_rows"])


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


FAMILY = {
    "Super": {"L": 1024, "R": 512, "E": 512, "I": 2688, "top_k": 22},
    "Nano": {"L": 2688, "R": 128, "E": 128, "I": 1856, "top_k": 6},
    "Ultra": {"L": 2048, "R": 512, "E": 64, "I": 5120, "top_k": 22},
}


@pytest.mark.parametrize("sm", SMS)
def test_every_launch_is_a_listed_variant_with_known_arguments(sm: int) -> None:
    listed = list(kernels.variants(sm))
    assert len({variant.name for variant in listed}) == len(listed)
    used = set()
    for X, W in DTYPES:
        if W == "float8_e4m3fn" and not supports_fp8(sm):
            continue
        for sizes in (*FAMILY.values(), {"L": 64, "R": 8, "E": 8, "I": 128, "top_k": 2}):
            for T in (1, 2, CHUNK, CHUNK + 1, 512, 2048, 8192):
                case = Case(T=T, X=X, W=W, **sizes)  # type: ignore[arg-type]
                used |= check_plan(case, sm, listed)
    assert used == {variant.name for variant in listed}


def check_plan(case: Case, sm: int, listed: list[Any]) -> set[str]:
    dims = {axis: getattr(case, axis) for axis in "TLREI"}
    known = {"y", *(tensor.name for tensor in SPEC.inputs), *case.attributes}
    known |= {*kernels.scratch(dims, case.attributes, case.dtypes)}
    plan = kernels.launches(dims, case.attributes, case.dtypes, sm)
    for launch in plan:
        assert launch.variant in listed
        named = [name for name in launch.variant.signature if name not in launch.integers]
        assert known >= {launch.renamed.get(name, name) for name in named}
        assert set(launch.renamed) <= set(named)
        assert all(size >= 1 for size in launch.grid)
        assert launch.grid[1] <= 65535
        for name in set(launch.variant.aligned) & set(launch.integers):
            assert launch.integers[name] % 16 == 0
    return {launch.variant.name for launch in plan}


def test_products_of_bf16_and_fp8_compile_for_hopper_without_spilling(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    products = [
        variant
        for variant in kernels.variants(90)
        if {"*bf16", "*fp8e4nv"} & set(variant.signature.values())
        and variant.kernel in ("up_kernel", "down_kernel")
        and (variant.constants.get("ROUND", "bf16"), variant.constants["DIRECT"]) == ("bf16", 0)
    ]
    assert len(products) == 14
    for variant in products:
        _, _, entry = compile_variant(SPEC.package, variant, 90)
        assert (variant.name, entry["spill_stores"], entry["spill_loads"]) == (variant.name, 0, 0)


def kernel_names(case: Case) -> list[str]:
    dims = {axis: getattr(case, axis) for axis in "TLREI"}
    plan = kernels.launches(dims, case.attributes, case.dtypes, 90)
    return [launch.variant.kernel.removesuffix("_kernel") for launch in plan]


def test_shapes_alone_pick_the_launches() -> None:
    case = Case(X="bfloat16", W="bfloat16", **FAMILY["Super"])  # type: ignore[arg-type]
    assert kernel_names(replace(case, T=1)) == ["route", "up", "down", "combine"]
    assert kernel_names(replace(case, T=64)) == ["route", "place", "up", "down", "combine"]
    assert kernel_names(replace(case, T=8192)) == ["route", "count", "place", "up", "down", "combine"]
    assert kernel_names(replace(case, T=64, W="float8_e4m3fn"))[0] == "route_and_quantize"
    assert [block_rows(replace(case, T=T)) for T in (1, 64, 390, 512, 1488, 2048, 8192)] == [
        *(16, 16, 16, 64, 64, 128, 128)
    ]


@given(cases(), st.integers(0, 4096), st.integers(0, 4096))
@settings(deadline=None, derandomize=True, database=None)
def test_the_largest_steps_workspace_serves_every_step(case: Case, fewer: int, more: int) -> None:
    def buffers(T: int) -> dict[str, Any]:
        dims = {axis: getattr(case, axis) for axis in "LREI"} | {"T": T}
        found: dict[str, Any] = kernels.scratch(dims, case.attributes, case.dtypes)
        blocks = kernels.derived(dims, case.attributes, case.dtypes, 90)["max_blocks"]
        assert blocks <= found["experts" if T == 1 else "blocks"].shape[-1]
        return found

    small, large = buffers(min(fewer, more)), buffers(max(fewer, more))
    assert all(small[name].num_bytes <= large[name].num_bytes for name in large)
    assert all(buffer.num_bytes % 256 == 0 for buffer in large.values())


@pytest.mark.parametrize(
    ("changed", "sm", "message"),
    [
        ({"W": "float8_e4m3fn"}, 80, r"SM 80 has no FP8 tensor cores: use fp16 or bf16 weights, or SM 89"),
        ({}, 75, "the SM to be one of 80, 86, 89, 90, 100, 120, got 75"),
        ({"X": "float16"}, 90, "W to be one of float16, float8_e4m3fn, got float32"),
        ({"X": "float64", "W": "float64"}, 90, "X to be one of .*, got float64"),
        ({"L": 24}, 90, "L to be a multiple of 16, got 24"),
        ({"I": 8}, 90, "I to be a multiple of 16, got 8"),
        ({"R": 513}, 90, "R to be from 1 to 512, got 513"),
        ({"top_k": 9}, 90, "top_k to be from 1 to 8, got 9"),
        ({"R": 64, "top_k": 33}, 90, "top_k to be from 1 to 32, got 33"),
        ({"num_groups": 3}, 90, r"num_groups = 3 does not divide 8 experts"),
        ({"num_groups": 2, "topk_group": 3}, 90, "topk_group to be from 1 to 2, got 3"),
        ({"first_expert": -1}, 90, "first_expert to be from 0 to 2147483647, got -1"),
    ],
)
def test_what_is_not_served_is_named(changed: dict[str, Any], sm: int, message: str) -> None:
    case = replace(Case(), **changed)
    dims = {axis: getattr(case, axis) for axis in "TLREI"}
    with pytest.raises(ValueError, match=f"^NemoMoeDispatch: .*{message}"):
        kernels.launches(dims, case.attributes, case.dtypes, sm)
