"""One compiled form of a Triton kernel: what `kernels.py` lists, `build.py` compiles and `plugin.cpp` launches.

Every `kernels.py` has the same entry points:

- `variants(sm)` yields each Variant that the model family needs on that SM;
- `launches(…)` gives the Launches for sizes, dtypes and an SM, from shapes alone;
- `run(*tensors, **attributes)` takes and gives what the op's reference does, launching the same variants through
  Triton: on a GPU, or in Triton's interpreter on a CPU.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

TRITON_DTYPES = {
    "float32": "fp32",
    "float16": "fp16",
    "bfloat16": "bf16",
    "float8_e4m3fn": "fp8e4nv",
    "int32": "i32",
    "int64": "i64",
}
"""Dtype names as the SPECs write them → Triton's own."""

SMS = (80, 86, 89, 90, 100, 120)
"""The GPU generations that kernels are compiled for."""


MAX_GRID = 65535
"""CUDA's limit on a grid's second and third axis."""


def supports_fp8(sm: int) -> bool:
    """Whether tensor cores of that SM take FP8 (E4M3): Ada, Hopper and later."""
    return sm >= 89


def check_sm(op: str, sm: int) -> None:
    """Raise ValueError, naming the op and what there is, for an SM that is not in `SMS`."""
    if sm not in SMS:
        raise ValueError(f"{op}: kernels are compiled for SM {', '.join(map(str, SMS))}, not {sm}")


def check_packed(op: str, sizes: Mapping[str, int]) -> None:
    """Raise ValueError, naming the op, for a step without tokens or with more sequences than a grid's axis has."""
    if not (sizes["T"] >= 1 and 1 <= sizes["B"] <= MAX_GRID):
        raise ValueError(
            f"{op}: kernels take T ≥ 1 and B in 1…{MAX_GRID}, not T {sizes['T']}, B {sizes['B']}"
        )


def device_sm(device: torch.device) -> int:
    """The SM whose variants run on a device; a CPU, with Triton's interpreter, takes Hopper's."""
    if device.type != "cuda":
        return 90
    import torch

    major, minor = torch.cuda.get_device_capability(device)
    capability: int = 10 * major + minor
    return max((sm for sm in SMS if sm // 10 == major and sm <= capability), default=capability)


@dataclass(frozen=True)
class Variant:
    """A kernel with its dtypes and constants fixed.

    `signature` maps each runtime parameter, in declaration order, to a Triton type (`*fp16`, `i32`, `fp32`);
    `aligned` names the parameters that the launcher promises to be multiples of 16 (bytes for pointers).
    """

    kernel: str
    signature: dict[str, str]
    constants: dict[str, int | float | bool | str]
    num_warps: int
    num_stages: int
    aligned: tuple[str, ...] = field(default=())

    @property
    def name(self) -> str:
        """A name unique among the op's variants: the kernel, its dtypes and its constants."""
        dtypes = dict.fromkeys(
            kind.removeprefix("*") for kind in self.signature.values() if kind.startswith("*")
        )
        constants = [f"{key}{value}" for key, value in self.constants.items()]
        return "_".join([self.kernel, *dtypes, *constants, f"w{self.num_warps}", f"s{self.num_stages}"])


@dataclass(frozen=True)
class Launch:
    """One launch: its variant, its grid, and its runtime integers by parameter.

    Any other parameter's name says what to pass: an input or output of the SPEC, a scratch buffer, an attribute.
    `renamed` has the parameters that take another one than their own.
    """

    variant: Variant
    grid: tuple[int, int, int]
    integers: dict[str, int]
    renamed: dict[str, str] = field(default_factory=dict)

    def start(self, kernel: Any, values: Mapping[str, Any]) -> None:
        """Launch it through Triton on contiguous tensors and attributes by name."""
        arguments = {
            name: self.integers[name] if name in self.integers else values[self.renamed.get(name, name)]
            for name in self.variant.signature
        }
        kernel[self.grid](
            **arguments,
            **self.variant.constants,
            num_warps=self.variant.num_warps,
            num_stages=self.variant.num_stages,
        )
