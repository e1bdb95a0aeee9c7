"""Inputs of the ops at the models' full width, as packed steps, for gpu_check and gpu_bench.

Every tensor is random with a given seed. It is NaN wherever an op must not read: in padding tokens, scratch rows, the
state of new sequences, unowned pages, and cache rows that have not been written.
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
from roofline import Count
from torch import Tensor

from nemotrt.plugins.contract import DType
from nemotrt.plugins.moe_dispatch.reference import route
from nemotrt.plugins.spec import OpSpec, ops

FP8 = DType.FLOAT8_E4M3


@dataclass(frozen=True)
class Model:
    """The sizes of one model that matter for the ops; the expert input is the latent if there is one."""

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
        """Channels of the convolution: x, B and C of the mixer."""
        return self.heads * self.head_dim + 2 * self.groups * self.state


SUPER = Model("Super", 128, 64, 8, 128, 32, 2, 128, 512, 22, 1024, 2688, 5.0)
NANO = Model("Nano", 64, 64, 8, 128, 32, 2, 128, 128, 6, 2688, 1856, 2.5)
TOY = Model("toy", 2, 64, 1, 128, 4, 2, 64, 8, 2, 32, 48, 2.5, page=64)


@dataclass(frozen=True)
class Step:
    """The sequences of one step: their number of tokens, and their context; padding tokens follow."""

    name: str
    lengths: tuple[int, ...]
    contexts: tuple[int, ...]
    padding: int = 0

    @property
    def num_tokens(self) -> int:
        """T, including padding."""
        return sum(self.lengths) + self.padding


def decode(sequences: int, context: int) -> Step:
    """One token for each sequence."""
    return Step(f"decode {sequences}", (1,) * sequences, (context,) * sequences)


def prefill(tokens: int) -> Step:
    """One new sequence."""
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
"""The supported combinations of each op's dtype variables."""


@dataclass(frozen=True)
class Case:
    """One op at one model's width, with one step and one combination of dtypes."""

    op: str
    model: Model
    step: Step
    dtypes: tuple[tuple[str, str], ...]

    @property
    def spec(self) -> OpSpec:
        """The op's SPEC."""
        return next(spec for spec in ops() if spec.torch_name == self.op)

    @property
    def dtype(self) -> dict[str, str]:
        """The dtype of each dtype variable."""
        return dict(self.dtypes)

    @property
    def title(self) -> str:
        """A name for tables and tests."""
        dtypes = ", ".join(f"{name} {dtype}" for name, dtype in self.dtypes)
        return f"{self.op}: {self.model.name}, {self.step.name}, {dtypes}"

    @property
    def needs_fp8(self) -> bool:
        """Whether the case needs FP8 tensor cores."""
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
        return _INPUTS[self.op](self, Random(device, seed))

    def count(self, inputs: list[Tensor]) -> Count:
        """The minimum work of the op on these inputs."""
        model, step, dtype = self.model, self.step, self.dtype
        x = DType(dtype["X"]).itemsize
        packed = (step.lengths, step.contexts)
        if self.op == "causal_conv1d":
            return roofline.conv(*packed, model.channels, model.taps, x)
        if self.op == "selective_scan":
            sizes = (model.heads, model.head_dim, model.groups, model.state)
            return roofline.scan(*packed, *sizes, x, DType(dtype["STATE"]).itemsize)
        if self.op == "paged_attention":
            heads = (model.query_heads, model.kv_heads, model.attention_dim)
            return roofline.attention(*packed, *heads, x, DType(dtype["CACHE"]).itemsize)
        routing = {name: value for name, value in self.attributes().items() if name != "first_expert"}
        chosen, _ = route(inputs[1], inputs[2], **routing)  # type: ignore[arg-type]
        distinct = int(chosen.flatten().bincount().count_nonzero())
        widths = (model.expert_input, model.inner, model.top_k)
        return roofline.experts(step.num_tokens, distinct, *widths, x, DType(dtype["W"]).itemsize)

    @property
    def compute_dtype(self) -> str:
        """The dtype of the op's matrix products, which decides the peak rate."""
        return self.dtype.get("W", self.dtype["X"])


def cases(model: Model, steps: tuple[Step, ...]) -> Iterator[Case]:
    """Every op with every combination of dtypes on each step."""
    for op, combinations in DTYPES.items():
        for dtypes in combinations:
            for step in steps:
                yield Case(op, model, step, tuple(dtypes.items()))


class Random:
    """Random tensors on a device, from one seed."""

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
        """The values as an int32 tensor."""
        return torch.tensor(values, dtype=torch.int32, device=self.device)

    def tokens(self, step: Step, dtype: str, *shape: int) -> Tensor:
        """Standard normal [T, …], with NaN in padding."""
        values = self.normal(step.num_tokens, *shape)
        values[sum(step.lengths) :] = torch.nan
        return values.to(DType(dtype).torch)

    def pool(self, step: Step, slots: list[int], dtype: str, *shape: int) -> Tensor:
        """Standard normal [rows, …] in the slots of sequences with a context, NaN in all others."""
        values = torch.full((2 * len(slots) + 1, *shape), torch.nan, device=self.device)
        for slot, context in zip(slots, step.contexts, strict=True):
            if context:
                values[slot] = self.normal(*shape)
        return values.to(DType(dtype).torch)

    def slots(self, step: Step) -> list[int]:
        """A row of the pool for each sequence, never row 0."""
        count = len(step.lengths)
        return [1 + slot for slot in self.permutation(2 * count)[:count]]

    def packed(self, step: Step) -> list[Tensor]:
        """query_start and context_len."""
        starts = [sum(step.lengths[:b]) for b in range(len(step.lengths) + 1)]
        return [self.integers(starts), self.integers(step.contexts)]


def conv_inputs(case: Case, random: Random) -> list[Tensor]:
    """Inputs of `NemoCausalConv1d`."""
    C, K, step = case.model.channels, case.model.taps, case.step
    dtype = DType(case.dtype["X"]).torch
    slots = random.slots(step)
    return [
        random.tokens(step, case.dtype["X"], C),
        (random.normal(C, K) / 2).to(dtype),
        random.normal(C).to(dtype),
        random.pool(step, slots, case.dtype["X"], C, K - 1),
        *random.packed(step),
        random.integers(slots),
    ]


def scan_inputs(case: Case, random: Random) -> list[Tensor]:
    """Inputs of `NemoSelectiveScan`; A and dt_bias have the range of the model's initial values."""
    model, step, x = case.model, case.step, case.dtype["X"]
    H, G, N = model.heads, model.groups, model.state
    slots = random.slots(step)
    delta = torch.exp(random.uniform(math.log(1e-3), math.log(0.1), H))
    return [
        random.tokens(step, x, H, model.head_dim),
        random.tokens(step, x, H),
        -random.uniform(1, 16, H),
        random.tokens(step, x, G, N),
        random.tokens(step, x, G, N),
        random.normal(H),
        delta + torch.log(-torch.expm1(-delta)),
        random.pool(step, slots, case.dtype["STATE"], H, model.head_dim, N),
        *random.packed(step),
        random.integers(slots),
    ]


def attention_inputs(case: Case, random: Random) -> list[Tensor]:
    """Inputs of `NemoPagedAttention`; with the FP8 scales, some keys and values saturate."""
    model, step, x = case.model, case.step, case.dtype["X"]
    V, D, page = model.kv_heads, model.attention_dim, model.page
    totals = [length + context for length, context in zip(step.lengths, step.contexts, strict=True)]
    used = [-(-total // page) for total in totals]
    kv_cache = random.normal(sum(used) + 2, 2, V, page, D)
    free = [1 + index for index in random.permutation(sum(used) + 1)]
    page_table = torch.zeros(len(used), max(used), dtype=torch.int32)
    kv_cache[0] = torch.nan
    kv_cache[free[sum(used) :]] = torch.nan
    first = 0
    for b, context in enumerate(step.contexts):
        pages = free[first : first + used[b]]
        first += used[b]
        page_table[b, : used[b]] = torch.tensor(pages, dtype=torch.int32)
        kv_cache[pages[-(-context // page) :]] = torch.nan
        if context % page:
            kv_cache[pages[context // page], :, :, context % page :] = torch.nan
    return [
        2 * random.tokens(step, x, model.query_heads, D),
        random.tokens(step, x, V, D),
        random.tokens(step, x, V, D),
        kv_cache.to(DType(case.dtype["CACHE"]).torch),
        random.uniform(0.006, 0.008, 1),
        random.uniform(0.006, 0.008, 1),
        *random.packed(step),
        page_table.to(random.device),
    ]


def expert_inputs(case: Case, random: Random) -> list[Tensor]:
    """Inputs of `NemoMoeDispatch`, which reads all of them, since it has no sequences.

    Scores differ by at least half the spacing of an even grid, which is more than the rounding error of a sigmoid.
    """
    model, T = case.model, case.step.num_tokens
    R, L, inner = model.experts, model.expert_input, model.inner
    bias = random.uniform(-0.02, 0.02, R)
    grid = torch.rand(T, R, generator=random.generator, device=random.device).argsort(1)
    ranked = 0.1 + 0.8 * (grid + random.uniform(-0.25, 0.25, T, R)) / R
    fp8 = case.dtype["W"] == FP8
    up_scale, down_scale = (random.uniform(0.5, 2, R, size) / (64 if fp8 else 1) for size in (inner, L))
    return [
        random.normal(T, L).to(DType(case.dtype["X"]).torch),
        torch.logit((ranked - bias).double()).float(),
        bias,
        _weight(random, case.dtype["W"], R, inner, L),
        _weight(random, case.dtype["W"], R, L, inner),
        up_scale,
        down_scale,
        random.uniform(0.008, 0.012, 1),
        random.uniform(0.04, 0.06, 1),
    ]


def _weight(random: Random, dtype: str, *shape: int) -> Tensor:
    """A weight with variance 1 / (the last size); FP8 weights are scaled by 64, which their scales cancel."""
    factor = (64 if dtype == FP8 else 1) * shape[-1] ** -0.5
    weight = torch.empty(shape, dtype=DType(dtype).torch, device=random.device)
    for e in range(shape[0]):
        weight[e] = (random.normal(*shape[1:]) * factor).to(weight.dtype)
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
    """A context in which single launches of interpreted kernels work; it does nothing for compiled kernels."""
    return interpreter().interpreting() if interpret else nullcontext()


@cache
def interpreter() -> ModuleType:
    """The tests' module that fixes Triton's interpreter."""
    sys.path.append(str(Path(__file__).parents[1] / "tests" / "conformance"))
    return importlib.import_module("interpreter")
