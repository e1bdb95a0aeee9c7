"""The specification of an op, from which the torch op, the ONNX schema, the plugin and the tests are derived.

This module imports nothing heavy: an op's reference, ONNX body and kernels are imported when they are first used.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from importlib import import_module
from typing import Any

from nemotrt.plugins.contract import DType

DOMAIN = "nemo"
"""The ONNX domain, torch library namespace and plugin namespace of every op."""

VERSION = 1
"""The version of the ops: the opset version of the ONNX domain, and `plugin_version` on every node."""

FLOATS = (DType.FLOAT32, DType.FLOAT16, DType.BFLOAT16)
"""The dtypes that activations can have."""


@dataclass(frozen=True)
class TensorSpec:
    """One input or output: its name, its axes as named or fixed sizes, and its dtype."""

    name: str
    axes: tuple[str | int, ...]
    dtype: DType | str
    """A fixed dtype, or the name of one of the op's dtype variables."""


@dataclass(frozen=True)
class Tolerance:
    """The largest allowed relative L2 error against the reference, and why."""

    relative_l2: float
    reason: str


@dataclass(frozen=True, eq=False)
class OpSpec:
    """One op: axes, inputs, outputs, attributes, dtypes and tolerances.

    An output named `next_<input>` replaces that input, which is a pool: a plugin updates it in place.
    """

    name: str
    label: str
    """The last part of a node's name: `layers.7.mixer.scan`."""
    summary: str
    axes: dict[str, str]
    """The meaning of each named axis."""
    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]
    attributes: dict[str, type[int] | type[float]]
    """The type of each attribute; a node must have them all."""
    dtypes: dict[str, tuple[DType, ...]]
    """The dtypes that each dtype variable can take."""
    tolerances: dict[str, Tolerance]
    package: str

    @property
    def torch_name(self) -> str:
        """The op's name in `torch.ops.nemo`, which is the package's name."""
        return self.package.rpartition(".")[2]

    @property
    def pools(self) -> dict[int, int]:
        """The index of each output that replaces an input, and that input's index."""
        return {
            i: self.input_index(output.name.removeprefix("next_"))
            for i, output in enumerate(self.outputs)
            if output.name.startswith("next_")
        }

    def input_index(self, name: str) -> int:
        """The position of an input; raises ValueError on an unknown name."""
        return [tensor.name for tensor in self.inputs].index(name)

    def sizes(self, shapes: list[tuple[Any, ...]]) -> dict[str, Any]:
        """The size of each named axis, from the inputs' shapes; raises ValueError that names a mismatching input.

        Sizes may be symbolic: an axis takes the first size found, and only plain integers are compared.
        """
        sizes: dict[str, Any] = {}
        for tensor, shape in zip(self.inputs, shapes, strict=True):
            message = f"{self.name}: {tensor.name} has shape {list(shape)}, expected {list(tensor.axes)}"
            if len(shape) != len(tensor.axes):
                raise ValueError(message)
            for axis, size in zip(tensor.axes, shape, strict=True):
                expected = axis if isinstance(axis, int) else sizes.setdefault(axis, size)
                if type(expected) is int and type(size) is int and expected != size:
                    raise ValueError(f"{message} with {axis} = {expected}")
        return sizes

    def reference(self) -> Callable[..., tuple[Any, ...]]:
        """The function that defines correct results; takes inputs in SPEC order and attributes by name."""
        return import_module(f"{self.package}.reference").reference  # type: ignore[no-any-return]

    def supports(self) -> Callable[[Mapping[str, float], Mapping[str, str], int], None]:
        """A check of (axes and attributes, dtype variables, SM), which raises ValueError if no kernel supports them."""
        return import_module(self.package).supports  # type: ignore[no-any-return]

    def onnx_body(self) -> Callable[..., tuple[Any, ...]]:
        """The function that writes the op in standard ONNX operators; see `onnx_op.function`."""
        return import_module(f"{self.package}.onnx_body").body  # type: ignore[no-any-return]


PACKED_AXES = {
    "T": "tokens in this step, the sequences packed one after the other",
    "B": "sequences in this step",
    "B+1": "sequences plus one; query_start[B] is where the padding tokens begin",
    "S": "rows of the recurrent pools; row 0 is scratch",
}
"""The axes of every op on packed sequences."""

PACKED_INPUTS = (
    TensorSpec("query_start", ("B+1",), DType.INT32),
    TensorSpec("context_len", ("B",), DType.INT32),
)
"""The inputs that assign tokens to sequences; see the graph's contract in docs/architecture.md."""


def ops() -> tuple[OpSpec, ...]:
    """The SPECs of all ops."""
    names = ("causal_conv1d", "selective_scan", "paged_attention", "moe_dispatch")
    return tuple(import_module(f"nemotrt.plugins.{name}").SPEC for name in names)
