"""Inputs for the ops at the models' full width, as packed steps: what gpu_check proves and gpu_bench times.

Every tensor is drawn from the seed. NaN stands wherever an op may not look: padding tokens, scratch rows, the
state of fresh sequences, pages that nobody owns, cache rows that nothing was written to.
"""

from __future__ import annotations

import importlib
import math
import sys
from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from types import ModuleType

import roofline
import torch
from roofline import BYTES, Count
from torch import Tensor

from nemotrt.plugins.moe_dispatch.reference import route
from nemotrt.plugins.spec import OpSpec, ops

FP8 = "float8_e4m3fn"


@dataclass(frozen=True)
class Model:
    """The sizes of one model that the ops see; the expert input is the latent where there is one."""

    name: str
    heads: int
    head_dim: int
    groups: int
    state: int
    query_heads: int
    kv_heads: int
    attention_dim: int
    experts: int
    top_k: int
    expert_input: int
    inner: int
    routed_scaling_factor: float
    page: int = 128
    taps: int = 4

    @property
    def channels(self) -> int:
        """What the convolution takes: x, B and C of the mixer."""
        return self.heads * self.head_dim + 2 * self.groups * self.state


SUPER = Model("Super", 128, 64, 8, 128, 32, 2, 128, 512, 22, 1024, 2688, 5.0)
NANO = Model("Nano", 64, 64, 8, 128, 32, 2, 128, 128, 6, 2688, 1856, 2.5)
TOY = Model("toy", 2, 64, 1, 128, 4, 2, 64, 8, 2, 32, 48, 2.5, page=64)


@dataclass(frozen=True)
class Step:
    """The sequences of one step: how many tokens each has, and had before; padding tokens follow them."""

    name: str
    lengths: tuple[int, ...]
    contexts: tuple[int, ...]
    padding: int = 0

    @property
    def num_tokens(self) -> int:
        """T, padding included."""
        return sum(self.lengths) + self.padding


def decode(sequences: int, context: int) -> Step:
    """One token for each of so many sequences."""
    return Step(f"decode {sequences}", (1,) * sequences, (context,) * sequences)


def prefill(tokens: int) -> Step:
    """One fresh sequence."""
    return Step(f"prefill {tokens}", (tokens,), (0,))


FULL_STEPS = (
    prefill(4096),
    Step("continued", (1777,), (1111,)),
    Step("mixture", (1, 0, 511, 1, 64, 1, 1030), (8000, 77, 0, 300, 129, 0, 1000), padding=13),
    decode(1, 8191),
    decode(64, 8191),
    Step("padded decode", (1,) * 29 + (0,) * 3, (5000,) * 15 + (0,) * 17, padding=3),
)
TOY_STEPS = (
    Step("mixture", (1, 0, 37, 1), (70, 7, 0, 3), padding=2),
    Step("padded decode", (1, 0, 1), (66, 3, 0), padding=1),
)

DTYPES: dict[str, tuple[dict[str, str], ...]] = {
    "causal_conv1d": tuple({"X": x} for x in ("float32", "float16", "bfloat16")),
    "selective_scan": (
        {"X": "float32", "STATE": "float32"},
        *({"X": x, "STATE": state} for x in ("float16", "bfloat16") for state in ("float32", "float16")),
    ),
    "moe_dispatch": tuple(
        {"X": x, "W": weight} for x in ("float32", "float16", "bfloat16") for weight in (x, FP8)
    ),
    "paged_attention": (
        *({"X": x, "CACHE": x} for x in ("float32", "float16", "bfloat16")),
        *({"X": x, "CACHE": FP8} for x in ("float16", "bfloat16")),
    ),
}
"""The dtypes of each op's variables that its kernels take together."""


@dataclass(frozen=True)
class Case:
    """One op at one model's width, for one step, in one set of dtypes."""

    op: str
    model: Model
    step: Step
    dtypes: tuple[tuple[str, str], ...]

    @property
    def spec(self) -> OpSpec:
        """The op's declaration."""
        return next(spec for spec in ops() if spec.torch_name == self.op)

    @property
    def dtype(self) -> dict[str, str]:
        """Dtype variable → dtype."""
        return dict(self.dtypes)

    @property
    def title(self) -> str:
        """What to call it in a table or a test's name."""
        dtypes = ", ".join(f"{name} {dtype}" for name, dtype in self.dtypes)
        return f"{self.op}: {self.model.name}, {self.step.name}, {dtypes}"

    @property
    def needs_fp8(self) -> bool:
        """Whether the SM must have FP8 tensor cores."""
        return FP8 in self.dtype.values()

    def attributes(self) -> dict[str, int | float]:
        """The node's attributes."""
        if self.op == "selective_scan":
            return {"dt_min": 0.0, "dt_max": math.inf}
        if self.op == "paged_attention":
            return {"scale": self.model.attention_dim**-0.5}
        if self.op == "moe_dispatch":
            fixed = {"num_groups": 1, "topk_group": 1, "norm_topk_prob": 1, "first_expert": 0}
            factor = self.model.routed_scaling_factor
            return {"top_k": self.model.top_k, "routed_scaling_factor": factor, **fixed}
        return {}

    def inputs(self, device: torch.device, seed: int) -> list[Tensor]:
        """Tensors in SPEC order."""
        return _INPUTS[self.op](self, Draw(device, seed))

    def count(self, inputs: list[Tensor]) -> Count:
        """The least work of the op on these inputs."""
        model, step, dtype = self.model, self.step, self.dtype
        x = BYTES[dtype["X"]]
        packed = (step.lengths, step.contexts)
        if self.op == "causal_conv1d":
            return roofline.conv(*packed, model.channels, model.taps, x)
        if self.op == "selective_scan":
            sizes = (model.heads, model.head_dim, model.groups, model.state)
            return roofline.scan(*packed, *sizes, x, BYTES[dtype["STATE"]])
        if self.op == "paged_attention":
            heads = (model.query_heads, model.kv_heads, model.attention_dim)
            return roofline.attention(*packed, *heads, x, BYTES[dtype["CACHE"]])
        routing = {name: value for name, value in self.attributes().items() if name != "first_expert"}
        chosen, _ = route(inputs[1], inputs[2], **routing)  # type: ignore[arg-type]
        distinct = int(chosen.flatten().bincount().count_nonzero())
        widths = (model.expert_input, model.inner, model.top_k)
        return roofline.experts(step.num_tokens, distinct, *widths, x, BYTES[dtype["W"]])

    @property
    def compute_dtype(self) -> str:
        """The dtype of the op's matrix products, whose rate bounds it."""
        return self.dtype.get("W", self.dtype["X"])


def cases(model: Model, steps: tuple[Step, ...]) -> Iterator[Case]:
    """Every op in every dtype on each step."""
    for op, combinations in DTYPES.items():
        for dtypes in combinations:
            for step in steps:
                yield Case(op, model, step, tuple(dtypes.items()))


class Draw:
    """Random tensors on a device from one seed."""

    def __init__(self, device: torch.device, seed: int) -> None:
        self.device = device
        self.generator = torch.Generator(device).manual_seed(seed)

    def normal(self, *shape: int) -> Tensor:
        """Standard normal, FP32."""
        return torch.randn(shape, generator=self.generator, device=self.device)

    def uniform(self, low: float, high: float, *shape: int) -> Tensor:
        """Uniform in [low, high), FP32."""
        return low + (high - low) * torch.rand(shape, generator=self.generator, device=self.device)

    def permutation(self, size: int) -> list[int]:
        """0 … size − 1 in a random order."""
        return torch.randperm(size, generator=self.generator, device=self.device).tolist()

    def integers(self, values: tuple[int, ...] | list[int]) -> Tensor:
        """The values as int32."""
        return torch.tensor(values, dtype=torch.int32, device=self.device)

    def tokens(self, step: Step, dtype: str, *shape: int) -> Tensor:
        """Standard normal [T, …], NaN in padding."""
        values = self.normal(step.num_tokens, *shape)
        values[sum(step.lengths) :] = torch.nan
        return values.to(getattr(torch, dtype))

    def pool(self, step: Step, slots: list[int], dtype: str, *shape: int) -> Tensor:
        """Standard normal [rows, …] in slots of sequences with a context, NaN in all others."""
        values = torch.full((2 * len(slots) + 1, *shape), torch.nan, device=self.device)
        for slot, context in zip(slots, step.contexts, strict=True):
            if context:
                values[slot] = self.normal(*shape)
        return values.to(getattr(torch, dtype))

    def slots(self, step: Step) -> list[int]:
        """A row of the pool for each sequence, row 0 never."""
        count = len(step.lengths)
        return [1 + slot for slot in self.permutation(2 * count)[:count]]

    def packed(self, step: Step) -> list[Tensor]:
        """query_start and context_len."""
        starts = [sum(step.lengths[:b]) for b in range(len(step.lengths) + 1)]
        return [self.integers(starts), self.integers(step.contexts)]


def conv_inputs(case: Case, draw: Draw) -> list[Tensor]:
    """For `NemoCausalConv1d`."""
    C, K, step = case.model.channels, case.model.taps, case.step
    dtype = getattr(torch, case.dtype["X"])
    slots = draw.slots(step)
    return [
        draw.tokens(step, case.dtype["X"], C),
        (draw.normal(C, K) / 2).to(dtype),
        draw.normal(C).to(dtype),
        draw.pool(step, slots, case.dtype["X"], C, K - 1),
        *draw.packed(step),
        draw.integers(slots),
    ]


def scan_inputs(case: Case, draw: Draw) -> list[Tensor]:
    """For `NemoSelectiveScan`; decays and the steps' biases as the model initialises them."""
    model, step, x = case.model, case.step, case.dtype["X"]
    H, G, N = model.heads, model.groups, model.state
    slots = draw.slots(step)
    delta = torch.exp(draw.uniform(math.log(1e-3), math.log(0.1), H))
    return [
        draw.tokens(step, x, H, model.head_dim),
        draw.tokens(step, x, H),
        -draw.uniform(1, 16, H),
        draw.tokens(step, x, G, N),
        draw.tokens(step, x, G, N),
        draw.normal(H),
        delta + torch.log(-torch.expm1(-delta)),
        draw.pool(step, slots, case.dtype["STATE"], H, model.head_dim, N),
        *draw.packed(step),
        draw.integers(slots),
    ]


def attention_inputs(case: Case, draw: Draw) -> list[Tensor]:
    """For `NemoPagedAttention`; FP8 scales leave some keys and values to saturate."""
    model, step, x = case.model, case.step, case.dtype["X"]
    V, D, page = model.kv_heads, model.attention_dim, model.page
    totals = [length + context for length, context in zip(step.lengths, step.contexts, strict=True)]
    used = [-(-total // page) for total in totals]
    kv_cache = draw.normal(sum(used) + 2, 2, V, page, D)
    free = [1 + index for index in draw.permutation(sum(used) + 1)]
    page_table = torch.zeros(len(used), max(used), dtype=torch.int32)
    kv_cache[0] = torch.nan
    kv_cache[free[sum(used) :]] = torch.nan
    taken = 0
    for b, context in enumerate(step.contexts):
        own = free[taken : taken + used[b]]
        taken += used[b]
        page_table[b, : used[b]] = torch.tensor(own, dtype=torch.int32)
        kv_cache[own[-(-context // page) :]] = torch.nan
        if context % page:
            kv_cache[own[context // page], :, :, context % page :] = torch.nan
    return [
        2 * draw.tokens(step, x, model.query_heads, D),
        draw.tokens(step, x, V, D),
        draw.tokens(step, x, V, D),
        kv_cache.to(getattr(torch, case.dtype["CACHE"])),
        draw.uniform(0.006, 0.008, 1),
        draw.uniform(0.006, 0.008, 1),
        *draw.packed(step),
        page_table.to(draw.device),
    ]


def expert_inputs(case: Case, draw: Draw) -> list[Tensor]:
    """For `NemoMoeDispatch`; every tensor is read, since its tokens are of no sequence.

    Scores keep apart by more than rounding of a sigmoid can move them: half the spacing of an even grid.
    """
    model, T = case.model, case.step.num_tokens
    R, L, inner = model.experts, model.expert_input, model.inner
    bias = draw.uniform(-0.02, 0.02, R)
    grid = torch.rand(T, R, generator=draw.generator, device=draw.device).argsort(1)
    ranked = 0.1 + 0.8 * (grid + draw.uniform(-0.25, 0.25, T, R)) / R
    fp8 = case.dtype["W"] == FP8
    up_scale, down_scale = (draw.uniform(0.5, 2, R, size) / (64 if fp8 else 1) for size in (inner, L))
    return [
        draw.normal(T, L).to(getattr(torch, case.dtype["X"])),
        torch.logit((ranked - bias).double()).float(),
        bias,
        _weight(draw, case.dtype["W"], R, inner, L),
        _weight(draw, case.dtype["W"], R, L, inner),
        up_scale,
        down_scale,
        draw.uniform(0.008, 0.012, 1),
        draw.uniform(0.04, 0.06, 1),
    ]


def _weight(draw: Draw, dtype: str, *shape: int) -> Tensor:
    """Entries of variance 1 / (the last size), times 64 in FP8, whose scales take that back."""
    factor = (64 if dtype == FP8 else 1) * shape[-1] ** -0.5
    weight = torch.empty(shape, dtype=getattr(torch, dtype), device=draw.device)
    for e in range(shape[0]):
        weight[e] = (draw.normal(*shape[1:]) * factor).to(weight.dtype)
    return weight


_INPUTS = {
    "causal_conv1d": conv_inputs,
    "selective_scan": scan_inputs,
    "moe_dispatch": expert_inputs,
    "paged_attention": attention_inputs,
}


@cache
def kernels(op: str, interpret: bool) -> ModuleType:
    """The op's kernels module; with `interpret`, a copy that runs in Triton's interpreter on a CPU."""
    name = f"nemotrt.plugins.{op}.kernels"
    return interpreter().interpreted(name) if interpret else importlib.import_module(name)


def interpreting(interpret: bool) -> AbstractContextManager[None]:
    """Within it, single launches of interpreted kernels run; it does nothing where kernels are compiled."""
    return interpreter().interpreting() if interpret else nullcontext()


@cache
def interpreter() -> ModuleType:
    """The tests' mended interpreter."""
    sys.path.append(str(Path(__file__).parents[1] / "tests" / "conformance"))
    return importlib.import_module("interpreter")
