"""Variants of Triton kernels, with dtypes and constants fixed, and their launches.

Every `kernels.py` has the same entry points:

- `variants(sm)` yields each Variant that the model family needs on that SM; `build.py` compiles them;
- `launches(…)` returns the Launches for the sizes, dtypes and SM, as `plugin.cpp` does;
- `run(*tensors, **attributes)` has the signature of the op's reference and launches the same variants through
  Triton, on a GPU or in Triton's interpreter on a CPU.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

SMS = (80, 86, 89, 90, 100, 120)
"""The GPU generations that kernels are compiled for."""

MAX_INT32 = 2**31 - 1
MAX_GRID = 65535
"""CUDA's limit on the second and third axis of a grid."""


def supports_fp8(sm: int) -> bool:
    """Whether the SM's tensor cores support FP8 (E4M3): Ada, Hopper and later."""
    return sm >= 89


def require(op: str, name: str, value: object, is_supported: bool, expected: str) -> None:
    """Raise ValueError, naming the op, the size or attribute, its value and the expected values, if not supported."""
    if not is_supported:
        raise ValueError(f"{op}: the kernels require {name} to be {expected}, got {value}")


def require_one_of(op: str, name: str, value: object, allowed: Sequence[object]) -> None:
    """Raise ValueError if the value is not one of those allowed."""
    require(op, name, value, value in allowed, f"one of {', '.join(map(str, allowed))}")


def require_range(op: str, name: str, value: int, low: int, high: int) -> None:
    """Raise ValueError if the value is not between `low` and `high`, inclusive."""
    require(op, name, value, low <= value <= high, f"from {low} to {high}")


def require_multiple(op: str, name: str, value: int, factor: int) -> None:
    """Raise ValueError if the value is not a multiple of the factor."""
    require(op, name, value, value % factor == 0, f"a multiple of {factor}")


def require_packed(op: str, sizes: Mapping[str, int]) -> None:
    """Raise ValueError for a step without tokens, or with more sequences than a grid axis allows."""
    require_range(op, "T", sizes["T"], 1, MAX_INT32)
    require_range(op, "B", sizes["B"], 1, MAX_GRID)


def check_sm(op: str, sm: int) -> None:
    """Raise ValueError, naming the op, if the SM is not in `SMS`."""
    require_one_of(op, "the SM", sm, SMS)


def device_sm(device: torch.device) -> int:
    """The SM whose variants run on a device; Triton's interpreter on a CPU uses Hopper's."""
    if device.type != "cuda":
        return 90
    import torch

    major, minor = torch.cuda.get_device_capability(device)
    capability: int = 10 * major + minor
    return max((sm for sm in SMS if sm // 10 == major and sm <= capability), default=capability)


@dataclass(frozen=True)
class Variant:
    """A kernel with its dtypes and constants fixed.

    `signature` maps each runtime parameter, in declaration order, to a Triton type (`*fp16`, `i32`, `fp32`).
    `aligned` lists the parameters that the launcher guarantees to be multiples of 16 (for pointers, the address).
    """

    kernel: str
    signature: dict[str, str]
    constants: dict[str, int | float | bool | str]
    num_warps: int
    num_stages: int
    aligned: tuple[str, ...] = ()

    @classmethod
    def from_json(cls, fields: dict[str, Any]) -> Variant:
        """The variant whose fields were written as JSON; raises KeyError or TypeError if they do not match."""
        return cls(**fields | {"aligned": tuple(fields["aligned"])})

    @property
    def name(self) -> str:
        """The kernel, its dtypes and its constants; unique among the op's variants."""
        dtypes = dict.fromkeys(
            kind.removeprefix("*") for kind in self.signature.values() if kind.startswith("*")
        )
        constants = [f"{key}{value}" for key, value in self.constants.items()]
        return "_".join([self.kernel, *dtypes, *constants, f"w{self.num_warps}", f"s{self.num_stages}"])


@dataclass(frozen=True)
class Launch:
    """One launch: its variant, its grid, and its integer arguments by parameter name.

    Every other parameter is passed the SPEC input or output, scratch buffer or attribute of its name, or of the name
    given in `renamed`.
    """

    variant: Variant
    grid: tuple[int, int, int]
    integers: dict[str, int]
    renamed: dict[str, str] = field(default_factory=dict)

    def start(self, kernel: Any, values: Mapping[str, Any]) -> None:
        """Launch the kernel through Triton; `values` holds contiguous tensors and attributes by name."""
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
