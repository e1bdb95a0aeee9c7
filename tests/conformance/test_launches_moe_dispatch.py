"""The launches of the experts' kernels: which variants a step takes, with which arguments, and what is refused."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from moe_cases import CHUNK, DTYPES, Case, block_rows, cases, kernels

from nemotrt.plugins.cubin import compile_variant
from nemotrt.plugins.moe_dispatch import SPEC
from nemotrt.plugins.variant import SMS, supports_fp8

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
