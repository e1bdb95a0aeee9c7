"""Each op through the plugin library, its kernels interpreted: the host's choice, arguments and workspace are right.

The library's enqueue launches through a driver that runs the variant it is given in Triton's interpreter, on the
very addresses that it is given. What is left to a GPU is that compiled code does what the interpreter does.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from host_library import SPECS, Launched, driver, library
from interpreter import interpreted, interpreting

from nemotrt.plugins.contract import DType
from nemotrt.plugins.spec import OpSpec

TORCH_DTYPES = {f"*{dtype.triton}": dtype.torch for dtype in DType if dtype is not DType.FLOAT8_E8M0}


@dataclass(frozen=True)
class Case:
    """A call: the sequences' lengths and contexts, the number of padding tokens, sizes, dtypes and attributes."""

    op: str
    sizes: dict[str, int]
    attributes: dict[str, Any]
    lengths: tuple[int, ...] = (1,)
    contexts: tuple[int, ...] = (0,)
    padding: int = 0
    X: str = "float16"
    other: str = ""

    def __str__(self) -> str:
        return f"{self.op} {self.lengths} {self.X} {self.other}"


class Memory:
    """Finds the tensor that a kernel's pointer argument points into."""

    def __init__(self) -> None:
        self._regions: list[tuple[int, int]] = []

    def add(self, address: int, num_bytes: int) -> None:
        self._regions.append((address, address + num_bytes))

    def at(self, address: int, dtype: torch.dtype) -> torch.Tensor:
        """The memory from an address to the end of its tensor."""
        (end,) = {end for start, end in self._regions if start <= address < end}
        count = (end - address) // dtype.itemsize
        held = (ctypes.c_char * (count * dtype.itemsize)).from_address(address)
        return torch.frombuffer(held, dtype=torch.uint8).view(dtype)


def random_inputs(case: Case) -> list[torch.Tensor]:
    """Inputs in SPEC order; every row that must not be read is NaN."""
    generator = torch.Generator().manual_seed(1)
    T, B = sum(case.lengths) + case.padding, len(case.lengths)
    sizes = case.sizes | {"T": T, "B": B, "B+1": B + 1}
    sizes |= {f"{name}-1": size - 1 for name, size in sizes.items()}
    fixed = {
        "query_start": torch.tensor([0, *case.lengths]).cumsum(0).int(),
        "context_len": torch.tensor(case.contexts, dtype=torch.int32),
        "slot": torch.arange(1, B + 1, dtype=torch.int32).flip(0),
        "A": -torch.rand(sizes.get("H", 1), generator=generator) - 0.1,
        "k_scale": torch.tensor([0.02]),
        "v_scale": torch.tensor([0.03]),
        "input_scale": torch.tensor([0.02]),
        "hidden_scale": torch.tensor([0.25]),
    }
    if "M" in sizes:
        fixed["page_table"] = (torch.randperm(B * sizes["M"], generator=generator) + 1).view(B, -1).int()
    spec = SPECS[case.op]
    dtypes = {name: case.X if name == "X" else case.other for name in spec.dtypes}
    inputs = []
    for tensor in spec.inputs:
        if tensor.name in fixed:
            inputs.append(fixed[tensor.name])
            continue
        shape = [axis if isinstance(axis, int) else sizes[axis] for axis in tensor.axes]
        values = torch.randn(shape, generator=generator) * 0.5
        inputs.append(values.to(getattr(torch, dtypes.get(tensor.dtype, tensor.dtype))))
    return inputs


def run(spec: OpSpec, inputs: Sequence[torch.Tensor], attributes: dict[str, Any]) -> tuple[torch.Tensor, ...]:
    """Run the op through the library's enqueue, on memory that is initially NaN."""
    kernels = interpreted(f"{spec.package}.kernels")
    forms = {form.name: form for form in kernels.variants(90)}
    plugin = library().plugin(spec, attributes)
    shapes = plugin.shape([(str(one.dtype).removeprefix("torch."), tuple(one.shape)) for one in inputs])
    given = [one.clone() for one in inputs]
    outputs = [
        given[alias] if alias >= 0 else torch.full(shape, torch.nan, dtype=getattr(torch, dtype))
        for (dtype, shape), alias in zip(shapes.outputs, shapes.aliases, strict=True)
    ]
    workspace = torch.full((shapes.workspace_bytes + 16,), 255, dtype=torch.uint8)
    memory = Memory()
    for one in (*given, *(one for one, alias in zip(outputs, shapes.aliases, strict=True) if alias < 0)):
        memory.add(one.data_ptr(), one.numel() * one.itemsize)
    memory.add(workspace.data_ptr(), shapes.workspace_bytes)

    def launch(launched: Launched) -> None:
        form = forms[launched.variant.decode()]
        kinds = list(form.signature.values())
        arguments = [
            memory.at(int(value), TORCH_DTYPES[kind]) if kind.startswith("*") else value
            for kind, value in zip(kinds, launched.values(kinds), strict=True)
        ]
        with interpreting():
            getattr(kernels, form.kernel)[tuple(launched.grid)](*arguments, **form.constants)

    with driver().running(launch):
        plugin.enqueue(
            [one.data_ptr() for one in given],
            [one.data_ptr() for one in outputs],
            workspace.data_ptr(),
            0,
        )
    assert workspace[shapes.workspace_bytes :].eq(255).all()
    for i, (before, after) in enumerate(zip(inputs, given, strict=True)):
        assert i in shapes.aliases or torch.equal(before.view(torch.uint8), after.view(torch.uint8))
    return tuple(outputs)


CONV = {"C": 32, "K": 4, "S": 5}
SCAN = {"H": 2, "P": 32, "G": 1, "N": 128, "S": 5}
LIMITS = {"dt_min": 0.001, "dt_max": 0.5}
ATTENTION = {"Q": 4, "V": 2, "D": 64, "page": 64, "M": 2, "K": 9}
MOE: dict[str, Any] = {
    "top_k": 2,
    "num_groups": 2,
    "topk_group": 1,
    "norm_topk_prob": 1,
    "routed_scaling_factor": 2.5,
    "first_expert": 2,
}
EXPERTS = {"L": 32, "R": 8, "E": 4, "I": 32}

CASES = [
    Case("causal_conv1d", CONV, {}, (5, 0, 1), (3, 2, 0), padding=2),
    Case("causal_conv1d", CONV, {}, (1, 1), (0, 7), X="float32"),
    Case("selective_scan", SCAN, LIMITS, (5, 0, 1), (3, 2, 0), padding=2, other="float16"),
    Case("selective_scan", SCAN, LIMITS, (70, 3, 11), (0, 4, 9), padding=1, other="float32"),
    Case("selective_scan", SCAN, LIMITS, (1, 2), (0, 7), X="float32", other="float32"),
    Case("paged_attention", ATTENTION, {"scale": 0.125}, (3, 20), (70, 0), 1, other="float16"),
    Case("paged_attention", ATTENTION, {"scale": 0.125}, (1, 0, 1), (9, 5, 0), 1, "bfloat16", "bfloat16"),
    Case("paged_attention", ATTENTION, {"scale": 0.125}, (2, 1), (70, 0), other="float8_e4m3fn"),
    Case("moe_dispatch", EXPERTS, MOE, (5,), other="float16"),
    Case("moe_dispatch", EXPERTS, MOE, (1,), X="float32", other="float32"),
    Case("moe_dispatch", EXPERTS, MOE, (130,), X="bfloat16", other="float8_e4m3fn"),
]


@pytest.mark.parametrize("case", CASES, ids=str)
def test_the_library_computes_what_the_reference_does(case: Case) -> None:
    spec, inputs = SPECS[case.op], random_inputs(case)
    expected = spec.reference()(*inputs, **case.attributes)
    found = run(spec, inputs, case.attributes)
    used = {case.X, case.other} - {""}
    tolerance = max(spec.tolerances[name].relative_l2 for name in used if name in spec.tolerances)
    for wanted, one in zip(expected, found, strict=True):
        assert one.shape == wanted.shape
        assert one.dtype == wanted.dtype
        error = (one.double() - wanted.double()).norm()
        assert error <= tolerance * wanted.double().norm()
