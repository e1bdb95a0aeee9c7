"""What an op is, said once: the torch op, the ONNX schema, the plugin's fields and the tests derive from it.

This module imports nothing heavy: an op's forms (reference, ONNX body, kernels) are loaded by name when one is used.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from importlib import import_module
from typing import Any

DOMAIN = "nemo"
"""The ONNX domain, torch library namespace and plugin namespace of every op."""

VERSION = 1
"""The version of the ops' meaning: ONNX opset of the domain, and `plugin_version` on every node."""

FLOATS = ("float32", "float16", "bfloat16")
"""Dtypes that an op computes in."""


@dataclass(frozen=True)
class TensorSpec:
    """One input or output: its name, its axes as named sizes or literals, and its dtype.

    `dtype` is a literal (`float32`, `int32`) or the name of one of the op's dtype variables.
    """

    name: str
    axes: tuple[str | int, ...]
    dtype: str


@dataclass(frozen=True)
class AttributeSpec:
    """One attribute of the node, `int` or `float`; every attribute is required on a node."""

    name: str
    type: type[int] | type[float]


@dataclass(frozen=True)
class Tolerance:
    """The largest relative L2 error that a form may show against the reference, and why this number."""

    relative_l2: float
    reason: str


@dataclass(frozen=True, eq=False)
class OpSpec:
    """One op: axes, inputs, outputs, attributes, dtypes and tolerances.

    `dtypes` maps a dtype variable to the dtypes it may take. Outputs named `next_<input>` replace that input:
    a plugin updates it in place, and its first axis is a pool whose row 0 is scratch.
    """

    name: str
    label: str
    """What the op is called in a node's name: `layers.7.mixer.scan`."""
    summary: str
    axes: dict[str, str]
    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]
    attributes: tuple[AttributeSpec, ...]
    dtypes: dict[str, tuple[str, ...]]
    tolerances: dict[str, Tolerance]
    package: str

    @property
    def torch_name(self) -> str:
        """The op's name in `torch.ops.nemo`: the package's own name."""
        return self.package.rpartition(".")[2]

    @property
    def pools(self) -> dict[int, int]:
        """Index of each output that replaces an input → that input's index."""
        index = {tensor.name: i for i, tensor in enumerate(self.inputs)}
        return {
            i: index[output.name.removeprefix("next_")]
            for i, output in enumerate(self.outputs)
            if output.name.startswith("next_")
        }

    def input_index(self, name: str) -> int:
        """The position of the input of this name; raises ValueError if there is none."""
        return [tensor.name for tensor in self.inputs].index(name)

    def sizes(self, shapes: list[tuple[Any, ...]]) -> dict[str, Any]:
        """Each axis' size, read off the inputs' shapes; raises ValueError that names what does not fit.

        Sizes may be symbolic: an axis takes the first size seen, and only plain integers are compared.
        """
        found: dict[str, Any] = {}
        for tensor, shape in zip(self.inputs, shapes, strict=True):
            if len(shape) != len(tensor.axes):
                raise ValueError(
                    f"{self.name}: {tensor.name} has shape {list(shape)}, wants {list(tensor.axes)}"
                )
            for axis, size in zip(tensor.axes, shape, strict=True):
                expected = axis if isinstance(axis, int) else found.setdefault(axis, size)
                if type(expected) is int and type(size) is int and expected != size:
                    raise ValueError(
                        f"{self.name}: {tensor.name} has shape {list(shape)}, wants {list(tensor.axes)}"
                        f" with {axis} = {expected}"
                    )
        return found

    def reference(self) -> Callable[..., tuple[Any, ...]]:
        """The definition of correct: inputs in SPEC order, then attributes by name → outputs in SPEC order."""
        return import_module(f"{self.package}.reference").reference  # type: ignore[no-any-return]

    def supports(self) -> Callable[[Mapping[str, float], Mapping[str, str], int], None]:
        """Takes axes and attributes by name, dtype variables and an SM; raises ValueError where no kernel does."""
        return import_module(f"{self.package}.supports").supports  # type: ignore[no-any-return]

    def onnx_body(self) -> Callable[..., tuple[Any, ...]]:
        """Writes the op in standard ONNX operators and gives its outputs: see `onnx_op.function`."""
        return import_module(f"{self.package}.onnx_body").body  # type: ignore[no-any-return]


PACKED_AXES = {
    "T": "tokens in this step, of all sequences one after the other",
    "B": "sequences in this step",
    "B+1": "sequences and one: query_start[B] is where the padding tokens begin",
    "S": "rows of the recurrent pools, row 0 is scratch",
}
"""Axes that every op on packed sequences shares."""

PACKED_INPUTS = (
    TensorSpec("query_start", ("B+1",), "int32"),
    TensorSpec("context_len", ("B",), "int32"),
)
"""Inputs that say which tokens are whose: see the graph's contract in docs/architecture.md."""


def ops() -> tuple[OpSpec, ...]:
    """The SPECs of all ops, in the order in which a layer meets them."""
    names = ("causal_conv1d", "selective_scan", "paged_attention", "moe_dispatch")
    return tuple(import_module(f"nemotrt.plugins.{name}").SPEC for name in names)
