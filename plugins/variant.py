"""One compiled form of a Triton kernel: what `kernels.py` lists, `build.py` compiles and `plugin.cpp` launches.

Every `kernels.py` has the same two entry points:

- `variants(sm)` yields each Variant that the model family needs on that SM;
- `run(*tensors, **attributes)` takes and gives what the op's reference does, launching the same variants through
  Triton: on a GPU, or in Triton's interpreter on a CPU.
"""

from __future__ import annotations

from dataclasses import dataclass, field

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


def supports_fp8(sm: int) -> bool:
    """Whether tensor cores of that SM take FP8 (E4M3): Ada, Hopper and later."""
    return sm >= 89


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
