"""Registers the ops as functional `torch.library` ops: `torch.ops.nemo.<package>(inputs…, attributes…) -> outputs`."""

from collections.abc import Callable
from typing import Any

import torch

from nemotrt.plugins.contract import DType
from nemotrt.plugins.spec import DOMAIN, OpSpec, ops


def schema(spec: OpSpec) -> str:
    """The torch schema of an op: tensors first, attributes keyword-only."""
    tensors = [f"Tensor {tensor.name}" for tensor in spec.inputs]
    attributes = [f"{kind.__name__} {name}" for name, kind in spec.attributes.items()]
    arguments = tensors + (["*", *attributes] if attributes else [])
    returns = ", ".join("Tensor" for _ in spec.outputs)
    return f"({', '.join(arguments)}) -> {returns if len(spec.outputs) == 1 else f'({returns})'}"


def fake(spec: OpSpec) -> Callable[..., Any]:
    """The op's fake implementation, for tracing; raises ValueError on shapes that do not match the SPEC."""

    def run(*tensors: torch.Tensor, **_: Any) -> Any:
        sizes = spec.sizes([tuple(tensor.shape) for tensor in tensors])
        variables = {
            t.dtype: tensor for t, tensor in zip(spec.inputs, tensors, strict=True) if t.dtype in spec.dtypes
        }
        outputs = []
        for output in spec.outputs:
            shape = [axis if isinstance(axis, int) else sizes[axis] for axis in output.axes]
            like = variables.get(output.dtype)
            dtype = like.dtype if like is not None else DType(output.dtype).torch
            outputs.append(tensors[0].new_empty(shape, dtype=dtype))
        return outputs[0] if len(outputs) == 1 else tuple(outputs)

    return run


def register(spec: OpSpec) -> None:
    """Define the op, with its fake, and its reference as the implementation on every device."""

    def run(*tensors: torch.Tensor, **attributes: Any) -> Any:
        outputs = spec.reference()(*tensors, **attributes)
        return outputs[0] if len(outputs) == 1 else outputs

    name = f"{DOMAIN}::{spec.torch_name}"
    torch.library.define(name, schema(spec))
    torch.library.impl(name, "CompositeExplicitAutograd")(run)
    torch.library.register_fake(name)(fake(spec))


def overload(spec: OpSpec) -> Any:
    """The op as it appears in a traced graph."""
    return getattr(getattr(torch.ops, DOMAIN), spec.torch_name).default


for _spec in ops():
    if not hasattr(getattr(torch.ops, DOMAIN), _spec.torch_name):
        register(_spec)
