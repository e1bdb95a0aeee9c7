"""Every op's ONNX body matches the reference for any mixture of sequences, with NaN wherever it must not read."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np
import onnx_ir as ir
import onnxruntime as ort
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from nemotrt.plugins import onnx_op
from nemotrt.plugins.spec import DOMAIN, VERSION, OpSpec, ops

OPS = {spec.torch_name: spec for spec in ops()}
DTYPES = {
    torch.float32: ir.DataType.FLOAT,
    torch.float16: ir.DataType.FLOAT16,
    torch.int32: ir.DataType.INT32,
}
FREE = {"T", "B", "B+1", "S", "M", "pages"}
PAGE = 8

SIZES = {
    "causal_conv1d": {"C": 12, "K": 4},
    "selective_scan": {"H": 4, "P": 8, "G": 2, "N": 16},
    "paged_attention": {"Q": 4, "V": 2, "D": 8, "page": PAGE},
    "moe_dispatch": {"L": 16, "R": 8, "E": 8, "I": 24},
}
ATTRIBUTES: dict[str, list[dict[str, Any]]] = {
    "causal_conv1d": [{}],
    "selective_scan": [{"dt_min": 0.0, "dt_max": 3.4e38}, {"dt_min": 0.1, "dt_max": 0.7}],
    "paged_attention": [{"scale": 0.35}],
    "moe_dispatch": [
        {
            "top_k": top_k,
            "num_groups": groups,
            "topk_group": kept,
            "norm_topk_prob": norm,
            "routed_scaling_factor": 2.5,
            "first_expert": 0,
        }
        for top_k, groups, kept, norm in [(3, 1, 1, 1), (1, 1, 1, 0), (4, 4, 2, 1), (8, 1, 1, 1)]
    ],
}
FORMS = [(name, i) for name, found in ATTRIBUTES.items() for i in range(len(found))]


@dataclass(frozen=True)
class Step:
    """Lengths of the sequences, the context each of them has, and padding tokens after the last."""

    lengths: tuple[int, ...]
    contexts: tuple[int, ...]
    padding: int
    seed: int


@st.composite
def steps(draw: st.DrawFn) -> Step:
    # Around 1 (decode), a chunk of few tokens, and one of 64.
    length = st.one_of(st.integers(0, 2), st.integers(3, 20), st.sampled_from([63, 64, 65, 130]))
    lengths = draw(st.lists(length, min_size=1, max_size=5))
    contexts = [draw(st.sampled_from([0, 1, 7, 8, 21])) for _ in lengths]
    padding = draw(st.integers(0 if any(lengths) else 1, 3))
    return Step(tuple(lengths), tuple(contexts), padding, draw(st.integers(0, 99)))


@cache
def session(name: str, form: int, dtype: torch.dtype) -> ort.InferenceSession:
    spec, sizes, attributes = OPS[name], SIZES[name], ATTRIBUTES[name][form]
    variables = {"X": dtype, "W": dtype, "CACHE": dtype, "STATE": torch.float32}

    def value(prefix: str, tensor: Any) -> ir.Value:
        kind = variables.get(tensor.dtype) or getattr(torch, tensor.dtype)
        axes = [sizes.get(axis, axis) for axis in axes_of(spec, tensor)]
        return ir.val(prefix + tensor.name, DTYPES[kind], axes)

    inputs = [value("", tensor) for tensor in spec.inputs]
    outputs = [value("out.", tensor) for tensor in spec.outputs]
    node = onnx_op.node(spec, inputs, outputs, attributes, "op")
    graph = ir.Graph(
        inputs, outputs, nodes=[node], opset_imports={"": onnx_op.OPSET, DOMAIN: VERSION}, name=name
    )
    function = onnx_op.function(spec, sizes, attributes)
    proto = ir.to_proto(ir.Model(graph, ir_version=10, functions=[function]))
    return ort.InferenceSession(proto.SerializeToString(), providers=["CPUExecutionProvider"])


def axes_of(spec: OpSpec, tensor: Any) -> list[str | int]:
    """The attention's K is a number of pages; the convolution's, its taps and a size of the model."""
    names = {"K-1": SIZES["causal_conv1d"]["K"] - 1} if spec.torch_name == "causal_conv1d" else {"K": "pages"}
    return [names.get(axis, axis) for axis in tensor.axes]


def tensors(spec: OpSpec, step: Step, dtype: torch.dtype) -> dict[str, torch.Tensor]:
    """Random inputs, NaN where the op must not read: padding tokens, new sequences' rows, free rows, stale pages."""
    generator = torch.Generator().manual_seed(step.seed)
    num_tokens, num_sequences = sum(step.lengths), len(step.lengths)
    max_pages = max(
        (length + context) // PAGE + 1 for length, context in zip(step.lengths, step.contexts, strict=True)
    )
    known = SIZES[spec.torch_name] | {
        "T": num_tokens + step.padding,
        "B": num_sequences,
        "B+1": num_sequences + 1,
        "S": num_sequences + 3,
        "pages": 1 + num_sequences * max_pages,
        "M": max_pages,
    }
    found: dict[str, torch.Tensor] = {}
    for tensor in spec.inputs:
        shape = [axis if isinstance(axis, int) else known[axis] for axis in axes_of(spec, tensor)]
        drawn = torch.randn(shape, generator=generator) / (shape[-1] ** 0.5 if tensor.dtype == "W" else 1)
        found[tensor.name] = drawn.to(dtype) if tensor.dtype in ("X", "W", "CACHE") else drawn
    order = torch.randperm(num_sequences + 2, generator=generator)[:num_sequences] + 1
    context = torch.tensor(step.contexts, dtype=torch.int32)
    integers = {
        "query_start": torch.tensor([0, *step.lengths]).cumsum(0).int(),
        "context_len": context,
        "slot": order.int(),
        "page_table": (torch.randperm(known["pages"] - 1, generator=generator) + 1)
        .int()
        .view(num_sequences, -1),
    }
    found |= {name: value for name, value in integers.items() if name in found}
    if "A" in found:
        found["A"] = -found["A"].square() - 0.1
    if "page_table" in found:
        poison_pages(found, step)
    for name in ("conv_state", "ssm_state"):
        if name in found:
            live = torch.zeros(known["S"], dtype=torch.bool)
            live[order[context > 0]] = True
            found[name][~live] = torch.nan
    if "query_start" in found:
        for tensor in spec.inputs:
            if tensor.axes[0] == "T":
                found[tensor.name][num_tokens:] = torch.nan
    found |= {
        name: torch.ones(1) for name in ("k_scale", "v_scale", "input_scale", "hidden_scale") if name in found
    }
    return found


def poison_pages(found: dict[str, torch.Tensor], step: Step) -> None:
    kept = found["kv_cache"].clone()
    found["kv_cache"][:] = torch.nan
    for pages, context in zip(found["page_table"], step.contexts, strict=True):
        for position in range(context):
            page, row = pages[position // PAGE], position % PAGE
            found["kv_cache"][page, :, :, row] = kept[page, :, :, row]


def bits(array: torch.Tensor) -> torch.Tensor:
    return array.contiguous().view({2: torch.int16, 4: torch.int32}[array.element_size()])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=["fp32", "fp16"])
@pytest.mark.parametrize(("name", "form"), FORMS)
@settings(max_examples=12, deadline=None, derandomize=True)
@given(step=steps())
def test_body_is_the_reference(name: str, form: int, dtype: torch.dtype, step: Step) -> None:
    spec = OPS[name]
    inputs = tensors(spec, step, dtype)
    expected = spec.reference()(*inputs.values(), **ATTRIBUTES[name][form])
    feeds = {key: value.numpy() for key, value in inputs.items()}
    outputs = [torch.from_numpy(array) for array in session(name, form, dtype).run(None, feeds)]
    limit = spec.tolerances[str(dtype).removeprefix("torch.")].relative_l2
    for i, (seen, wanted) in enumerate(zip(outputs, expected, strict=True)):
        if i in spec.pools:
            old = list(inputs.values())[spec.pools[i]][1:]
            seen, wanted = seen[1:], wanted[1:]  # row 0 is scratch
            untouched = bits(wanted) == bits(old)
            assert torch.equal(bits(seen)[untouched], bits(old)[untouched])
            seen, wanted = seen[~untouched], wanted[~untouched]
        error = (seen.double() - wanted.double()).norm() / wanted.double().norm().clamp_min(1e-30)
        assert error <= limit, f"{spec.outputs[i].name}: {error:.2e} over {limit:.0e}"


@pytest.mark.parametrize("step", [Step((130,), (21,), 0, 0), Step((40, 1, 70), (0, 8, 7), 2, 1)], ids=str)
def test_strong_decay_leaves_the_tokens_after_it_exact(step: Step) -> None:
    spec, attributes = OPS["selective_scan"], ATTRIBUTES["selective_scan"][0]
    inputs = tensors(spec, step, torch.float32)
    generator = torch.Generator().manual_seed(step.seed)
    inputs["A"] = -1 - 15 * torch.rand(inputs["A"].shape, generator=generator)
    is_strong = torch.rand(inputs["dt"].shape, generator=generator) < 0.2
    inputs["dt"] = torch.where(is_strong, 20.0, -5.0)  # Δ·A about −170, and −0.06
    expected = spec.reference()(*inputs.values(), **attributes)
    seen = session("selective_scan", 0, torch.float32).run(
        None, {key: value.numpy() for key, value in inputs.items()}
    )
    limit = spec.tolerances["float32"].relative_l2
    live = inputs["slot"].long()
    pairs = [(seen[0], expected[0]), (seen[1][live], expected[1][live])]
    for found, wanted in pairs:
        error = np.linalg.norm(found - wanted.numpy()) / np.linalg.norm(wanted.numpy())
        assert error <= limit, f"{error:.2e} over {limit:.0e}"


@pytest.mark.parametrize("name", [name for name in OPS if name != "moe_dispatch"])
def test_a_sequence_that_holds_nan_leaves_the_others_alone(name: str) -> None:
    spec = OPS[name]
    step = Step((5, 3, 1), (8, 0, 7), 0, 0)
    inputs = tensors(spec, step, torch.float32)
    clean = session(name, 0, torch.float32).run(None, {key: value.numpy() for key, value in inputs.items()})
    for tensor in spec.inputs:
        if tensor.axes[0] == "T":
            inputs[tensor.name][5:8] = torch.nan
    spoilt = session(name, 0, torch.float32).run(None, {key: value.numpy() for key, value in inputs.items()})
    assert np.isnan(spoilt[0][5:8]).all()
    assert np.array_equal(np.delete(clean[0], [5, 6, 7], 0), np.delete(spoilt[0], [5, 6, 7], 0))


def test_experts_of_another_rank_add_nothing() -> None:
    spec, attributes = OPS["moe_dispatch"], ATTRIBUTES["moe_dispatch"][0]
    inputs = tensors(spec, Step((9,), (0,), 0, 1), torch.float32)
    whole = spec.reference()(*inputs.values(), **attributes)[0]
    parts = []
    for first in (0, 4):
        rank = {key: value[first : first + 4] if key in ("up", "down", "up_scale", "down_scale") else value
                for key, value in inputs.items()}  # fmt: skip
        own = attributes | {"first_expert": first}
        parts.append(spec.reference()(*rank.values(), **own)[0])
        function = onnx_op.function(spec, SIZES["moe_dispatch"] | {"E": 4}, own)
        values = [ir.val(key, DTYPES[value.dtype], list(value.shape)) for key, value in rank.items()]
        y = ir.val("y", ir.DataType.FLOAT, [9, 16])
        graph = ir.Graph(values, [y], nodes=[onnx_op.node(spec, values, [y], own, "op")],
                         opset_imports={"": onnx_op.OPSET, DOMAIN: VERSION}, name="rank")  # fmt: skip
        proto = ir.to_proto(ir.Model(graph, ir_version=10, functions=[function]))
        run = ort.InferenceSession(proto.SerializeToString(), providers=["CPUExecutionProvider"]).run
        seen = run(None, {key: value.numpy() for key, value in rank.items()})[0]
        assert np.allclose(seen, parts[-1].numpy(), rtol=1e-5, atol=1e-6)
    assert torch.allclose(parts[0] + parts[1], whole, rtol=1e-5, atol=1e-6)
