"""Cases of the experts' kernels, and how one is executed in Triton's interpreter."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from hypothesis import strategies as st
from interpreter import interpreted, interpreting

from nemotrt.plugins.moe_dispatch import SPEC

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


def block_rows(case: Case, sm: int = 90) -> int:
    dims = {axis: getattr(case, axis) for axis in "TLREI"}
    return int(kernels.derived(dims, case.attributes, case.dtypes, sm)["block_rows"])
