"""Which variants a choice of SMs, dtypes and ops takes, and what it refuses."""

from __future__ import annotations

from collections.abc import Sequence

import pytest

from nemotrt.plugins.build import DTYPES, check_selection, packages, selected
from nemotrt.plugins.kernel_index import KernelError
from nemotrt.plugins.spec import ops
from nemotrt.plugins.variant import SMS, Variant, supports_fp8


def variant(kernel: str, *pointers: str, **constants: str) -> Variant:
    signature = {f"p{i}": f"*{kind}" for i, kind in enumerate(pointers)} | {"N": "i32"}
    return Variant(kernel, signature, {"BLOCK": 16, **constants}, num_warps=4, num_stages=1)


def check(
    sms: Sequence[int] = SMS, dtypes: Sequence[str] = (), op_names: Sequence[str] = tuple(packages())
) -> None:
    check_selection(sms, dtypes, op_names)


def test_dtypes() -> None:
    plain = [variant("conv", dtype, "i32") for dtype in ("fp32", "fp16", "bf16")]
    weights = [variant("gemm", "fp8e4nv", ROUND=dtype) for dtype in ("fp32", "fp16", "bf16")]
    state = variant("scan", "bf16", "fp16")
    anywhere = variant("route", "fp32", "i8")
    everything = [*plain, *weights, state, anywhere]
    assert selected(everything, []) == everything
    assert selected(everything, ["fp16"]) == [plain[1], anywhere]
    assert selected(everything, ["fp32"]) == [plain[0], anywhere]
    assert selected(everything, ["bf16", "fp8"]) == [plain[2], weights[2], anywhere]
    assert selected(everything, ["bf16", "fp16"]) == [plain[1], plain[2], state, anywhere]


def test_unknown_names_are_refused_with_the_known() -> None:
    with pytest.raises(KernelError, match="SM 75: choose from 80, 86, 89, 90, 100, 120"):
        check((75,))
    with pytest.raises(KernelError, match="dtype int8: choose from fp32, fp16, bf16, fp8"):
        check(dtypes=("int8",))
    with pytest.raises(KernelError, match=r"op softmax: choose from .*selective_scan"):
        check(op_names=("softmax",))
    with pytest.raises(KernelError, match="nothing to compile"):
        check(op_names=())


@pytest.mark.parametrize("sm", [sm for sm in SMS if not supports_fp8(sm)])
def test_fp8_where_there_is_none(sm: int) -> None:
    with pytest.raises(KernelError, match=rf"SM {sm} has no FP8 tensor cores: .* choose from SM 89, 90"):
        check((sm, 90), ("fp16", "fp8"))
    check((sm,))


def test_fp8_alone() -> None:
    with pytest.raises(KernelError, match="add fp16 or bf16"):
        check((90,), ("fp8",))


def test_every_dtype_of_a_spec_can_be_chosen() -> None:
    dtypes = {dtype.triton for spec in ops() for allowed in spec.dtypes.values() for dtype in allowed}
    assert dtypes == set(DTYPES.values())
