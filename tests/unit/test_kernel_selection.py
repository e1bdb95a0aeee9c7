"""Which variants a choice of SMs, dtypes and ops takes, and what it refuses."""

from __future__ import annotations

import pytest

from nemotrt.plugins.build import DTYPES, Selection, selected
from nemotrt.plugins.kernel_index import KernelError
from nemotrt.plugins.variant import SMS, TRITON_DTYPES, supports_fp8


def variant(kernel: str, *pointers: str, **constants: str) -> dict[str, object]:
    signature = {f"p{i}": f"*{kind}" for i, kind in enumerate(pointers)} | {"N": "i32"}
    return {"kernel": kernel, "signature": signature, "constants": {"BLOCK": 16, **constants}}


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
        Selection((75,))
    with pytest.raises(KernelError, match="dtype int8: choose from fp32, fp16, bf16, fp8"):
        Selection(dtypes=("int8",))
    with pytest.raises(KernelError, match=r"op softmax: choose from .*selective_scan"):
        Selection(ops=("softmax",))
    with pytest.raises(KernelError, match="nothing to compile"):
        Selection(ops=())


@pytest.mark.parametrize("sm", [sm for sm in SMS if not supports_fp8(sm)])
def test_fp8_where_there_is_none(sm: int) -> None:
    with pytest.raises(KernelError, match=rf"SM {sm} has no FP8 tensor cores: .* choose from SM 89, 90"):
        Selection((sm, 90), ("fp16", "fp8"))
    Selection((sm,))


def test_fp8_alone() -> None:
    with pytest.raises(KernelError, match="choose fp16 or bf16 beside it"):
        Selection((90,), ("fp8",))


def test_every_dtype_of_a_spec_can_be_chosen() -> None:
    narrow = {kind for name, kind in TRITON_DTYPES.items() if "float" in name}
    assert narrow == set(DTYPES.values())
