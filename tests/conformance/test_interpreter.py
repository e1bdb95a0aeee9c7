"""The fixed interpreter computes as a GPU does, and each fix is still needed."""

from __future__ import annotations

import os

import pytest
import torch
from interpreter import MENDS, interpreted, interpreting

probe = interpreted("interpreter_probe")
EVERY_BYTE = torch.arange(256, dtype=torch.uint8)


def launch(kernel: str, *arguments: object, mends: tuple[str, ...] = tuple(MENDS)) -> None:
    with interpreting(mends):
        getattr(probe, kernel)[(1,)](*arguments)


def cast(source: torch.Tensor, dtype: torch.dtype, mends: tuple[str, ...] = tuple(MENDS)) -> torch.Tensor:
    target = torch.empty(source.shape, dtype=dtype)
    launch("cast", source, target, source.numel(), mends=mends)
    return target


def numbers(size: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    exponents = torch.randint(-12, 12, (size,), generator=generator)
    return torch.randn(size, generator=generator) * 2.0**exponents


def same(left: torch.Tensor, right: torch.Tensor) -> bool:
    return torch.equal(left.float().nan_to_num(nan=12345.0), right.float().nan_to_num(nan=12345.0))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_fp32_rounds_to_nearest_even(dtype: torch.dtype) -> None:
    ties = torch.tensor([1 + 2**-8, 1 + 3 * 2**-8, -1 - 2**-11, 1 + 3 * 2**-11])
    source = torch.cat([ties, numbers(252)])
    assert same(cast(source, dtype), source.to(dtype))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_every_fp8_value_casts_up_and_back(dtype: torch.dtype) -> None:
    source = EVERY_BYTE.view(torch.float8_e4m3fn)
    up = cast(source, dtype)
    assert same(up, source.to(dtype))
    assert same(cast(up, torch.float8_e4m3fn), source)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_casts_to_fp8_round_and_saturate(dtype: torch.dtype) -> None:
    extremes = torch.tensor(
        [448.0, 464.0, 1e4, -1e4, torch.inf, -torch.inf, torch.nan, 2.0**-9, 2.0**-10, 0.0]
    )
    source = torch.cat([extremes, numbers(246)]).to(dtype)
    assert same(cast(source, torch.float8_e4m3fn), source.float().clamp(-448, 448).to(torch.float8_e4m3fn))


def test_integers_cast_to_bf16() -> None:
    source = torch.arange(-128, 128, dtype=torch.int32)
    assert same(cast(source, torch.bfloat16), source.to(torch.bfloat16))


def test_bf16_arithmetic_is_on_values() -> None:
    a, b = numbers(64).bfloat16(), numbers(128)[64:].bfloat16()
    target = torch.empty_like(a)
    launch("product", a, b, target, 64)
    assert same(target, a * b)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float8_e4m3fn])
def test_dot_is_on_values(dtype: torch.dtype) -> None:
    a, b = (torch.randn(16, 16, generator=torch.Generator().manual_seed(seed)).to(dtype) for seed in (0, 1))
    target = torch.empty(16, 16)
    launch("dot", a, b, target, 16, "tf32")
    torch.testing.assert_close(target, a.float() @ b.float(), rtol=1e-5, atol=1e-5)


def test_fp32_dot_is_exact_only_where_ieee_is_asked_for() -> None:
    a, b = (torch.randn(16, 16, generator=torch.Generator().manual_seed(seed)) for seed in (0, 1))
    ieee, tf32 = torch.empty(16, 16), torch.empty(16, 16)
    launch("dot", a, b, ieee, 16, "ieee")
    launch("dot", a, b, tf32, 16, "tf32")
    assert (ieee - a @ b).norm() / (a @ b).norm() < 1e-6
    assert 1e-5 < (tf32 - a @ b).norm() / (a @ b).norm() < 1e-2


def test_functions_of_triton_itself_are_interpreted() -> None:
    source = torch.randn(16, 16)
    target = torch.empty(16)
    launch("row_sums", source, target, 16)
    torch.testing.assert_close(target, source.sum(1))


class TestEachMendIsNeeded:
    """Fails if upstream has fixed a defect, so that our fix can be removed."""

    def without(self, name: str) -> tuple[str, ...]:
        return tuple(mend for mend in MENDS if mend != name)

    def test_cast_impl(self) -> None:
        source = numbers(256)
        assert not same(cast(source, torch.bfloat16, self.without("cast_impl")), source.bfloat16())

    def test_create_fp_to_fp(self) -> None:
        source = numbers(256).clamp(-400, 400)
        wrong = cast(source, torch.float8_e4m3fn, self.without("create_fp_to_fp"))
        assert not same(wrong, source.to(torch.float8_e4m3fn))

    def test_binary_op(self) -> None:
        a = numbers(64).bfloat16()
        target = torch.empty_like(a)
        launch("product", a, a, target, 64, mends=self.without("binary_op"))
        assert not same(target, a * a)

    def test_create_dot(self) -> None:
        a = torch.randn(16, 16, generator=torch.Generator().manual_seed(0)).bfloat16()
        target = torch.empty(16, 16)
        launch("dot", a, a, target, 16, "tf32", mends=self.without("create_dot"))
        assert not torch.allclose(target, a.float() @ a.float(), rtol=0.1)


def test_compiling_works_after_interpreting(monkeypatch: pytest.MonkeyPatch, tmp_path: object) -> None:
    import interpreter_probe
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    test_functions_of_triton_itself_are_interpreted()
    source = ASTSource(interpreter_probe.row_sums, {"source": "*fp32", "target": "*fp32"}, {"SIZE": 16})
    compiled = triton.compile(source, target=GPUTarget("cuda", 90, 32))
    assert compiled.asm["cubin"]
    assert "TRITON_INTERPRET" not in os.environ
    test_functions_of_triton_itself_are_interpreted()
