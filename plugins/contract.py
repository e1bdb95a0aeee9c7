"""The vocabulary of the graph: its dtypes, its step inputs, its pools, and the names of its layers.

PyTorch, ONNX, TensorRT, Triton, NumPy and safetensors each have their own name for a dtype, and layers are named
differently in a checkpoint and in a graph. All these names are listed here; nothing heavy is imported.
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from enum import StrEnum
from typing import TYPE_CHECKING, Any, NamedTuple, Self

if TYPE_CHECKING:
    import numpy as np
    import torch as pytorch


class DType(StrEnum):
    """A tensor's element type. The value is PyTorch's name, which is NumPy's (with ml_dtypes) too."""

    FLOAT64 = "float64"
    FLOAT32 = "float32"
    FLOAT16 = "float16"
    BFLOAT16 = "bfloat16"
    FLOAT8_E4M3 = "float8_e4m3fn"
    FLOAT8_E5M2 = "float8_e5m2"
    FLOAT8_E8M0 = "float8_e8m0fnu"
    INT64 = "int64"
    INT32 = "int32"
    INT16 = "int16"
    INT8 = "int8"
    UINT8 = "uint8"
    BOOL = "bool"

    @property
    def itemsize(self) -> int:
        """Bytes an element."""
        return _NAMES[self].itemsize

    @property
    def label(self) -> str:
        """What people call it: `BF16`."""
        return _NAMES[self].label

    @property
    def onnx(self) -> int:
        """The number of `onnx.TensorProto.DataType`, which is onnx_ir's `DataType` too."""
        return _NAMES[self].onnx

    @property
    def safetensors(self) -> str:
        """The name in a safetensors header: `BF16`."""
        return _NAMES[self].safetensors

    @property
    def triton(self) -> str:
        """The name of a kernel parameter's type in Triton: `bf16`; raises ValueError if Triton has none."""
        if not (name := _NAMES[self].triton):
            raise ValueError(f"Triton has no {self}")
        return name

    @property
    def tensorrt(self) -> int:
        """The number of `nvinfer1::DataType`; raises ValueError if TensorRT has none."""
        if (number := _NAMES[self].tensorrt) is None:
            raise ValueError(f"TensorRT has no {self}")
        return number

    @property
    def torch(self) -> pytorch.dtype:
        """PyTorch's dtype; imports PyTorch."""
        import torch

        return getattr(torch, self.value)  # type: ignore[no-any-return]

    @property
    def numpy(self) -> np.dtype[Any]:
        """NumPy's dtype; ml_dtypes adds the types that NumPy does not have."""
        import ml_dtypes  # noqa: F401  registers bfloat16 and float8 with NumPy
        import numpy as np

        return np.dtype(self.value)

    @classmethod
    def from_onnx(cls, number: int) -> Self:
        """The dtype with this ONNX number; raises ValueError on one that no graph here has."""
        return cls._find("onnx", number)

    @classmethod
    def from_safetensors(cls, name: str) -> Self:
        """The dtype with this name in a safetensors header; raises ValueError on an unknown one."""
        return cls._find("safetensors", name)

    @classmethod
    def from_tensorrt(cls, number: int) -> Self:
        """The dtype with this `nvinfer1::DataType` number; raises ValueError on an unknown one."""
        return cls._find("tensorrt", number)

    @classmethod
    def from_torch(cls, dtype: pytorch.dtype) -> Self:
        """PyTorch's dtype; raises ValueError on one that has no name here."""
        return cls(str(dtype).removeprefix("torch."))

    @classmethod
    def _find(cls, column: str, name: object) -> Self:
        for dtype, names in _NAMES.items():
            if getattr(names, column) == name:
                return cls(dtype)
        raise ValueError(f"{name} is not a known dtype")


class _Names(NamedTuple):
    label: str
    itemsize: int
    onnx: int
    safetensors: str
    triton: str
    tensorrt: int | None


_NAMES = {
    DType.FLOAT64: _Names("FP64", 8, 11, "F64", "fp64", None),
    DType.FLOAT32: _Names("FP32", 4, 1, "F32", "fp32", 0),
    DType.FLOAT16: _Names("FP16", 2, 10, "F16", "fp16", 1),
    DType.BFLOAT16: _Names("BF16", 2, 16, "BF16", "bf16", 7),
    DType.FLOAT8_E4M3: _Names("FP8", 1, 17, "F8_E4M3", "fp8e4nv", 6),
    DType.FLOAT8_E5M2: _Names("FP8 (E5M2)", 1, 19, "F8_E5M2", "fp8e5", None),
    DType.FLOAT8_E8M0: _Names("FP8 (E8M0)", 1, 24, "F8_E8M0", "", 11),
    DType.INT64: _Names("INT64", 8, 7, "I64", "i64", 8),
    DType.INT32: _Names("INT32", 4, 6, "I32", "i32", 3),
    DType.INT16: _Names("INT16", 2, 5, "I16", "i16", None),
    DType.INT8: _Names("INT8", 1, 3, "I8", "i8", 2),
    DType.UINT8: _Names("UINT8", 1, 2, "U8", "u8", 5),
    DType.BOOL: _Names("BOOL", 1, 9, "BOOL", "i1", 4),
}

STEP_INPUTS: dict[str, tuple[DType, tuple[str, ...]]] = {
    "input_ids": (DType.INT64, ("T",)),
    "query_start": (DType.INT32, ("B+1",)),
    "context_len": (DType.INT32, ("B",)),
    "slot": (DType.INT32, ("B",)),
    "page_table": (DType.INT32, ("B", "M")),
    "logits_row": (DType.INT32, ("R",)),
}
"""The graph's inputs that describe a step, in order: dtype and axes of each."""

LOGITS = "logits"
NEXT = "next."
"""Prefix of the output that replaces a pool."""

SLOT_AXIS, PAGE_AXIS = "S", "K"
"""Names of a pool's first axis: its rows are slots, or pages."""


@dataclass(frozen=True)
class PoolSpec:
    """A pool of recurrent state (a row for each slot) or of KV cache (a row for each page); row 0 is scratch."""

    name: str
    """The kind and the layer's index in the checkpoint: `ssm_state.7`."""
    dtype: DType
    row_shape: tuple[int, ...]
    """Of a slot, or of a page: [2, kv_heads, page_size, head_dim]."""

    @property
    def kind(self) -> str:
        """`conv_state`, `ssm_state` or `kv_cache`."""
        return self.name.partition(".")[0]

    @property
    def layer(self) -> int:
        """The layer's index in the checkpoint."""
        return int(self.name.partition(".")[2])

    @property
    def is_paged(self) -> bool:
        """Whether rows are pages, not slots."""
        return self.kind == "kv_cache"

    @property
    def axis(self) -> str:
        """The name of the first axis."""
        return PAGE_AXIS if self.is_paged else SLOT_AXIS

    @property
    def output(self) -> str:
        """The graph's output that replaces the pool."""
        return NEXT + self.name

    @property
    def page_size(self) -> int:
        """Tokens a page; 0 where rows are slots."""
        return self.row_shape[2] if self.is_paged else 0

    @property
    def row_bytes(self) -> int:
        """Bytes of one row."""
        return math.prod(self.row_shape) * self.dtype.itemsize

    def shape(self, num_slots: int, num_pages: int) -> tuple[int, ...]:
        """The whole pool's shape, scratch row included."""
        return (num_pages if self.is_paged else num_slots, *self.row_shape)


EMBEDDINGS, HEAD = "embeddings", "head"

_LAYER = re.compile(r"(?:backbone\.|model\.)?layers\.(\d+)(?:\.|$)(.*)")
_POOL = re.compile(rf"(?:{re.escape(NEXT)})?(conv_state|ssm_state|kv_cache)\.(\d+)")
_ENDS = re.compile(
    r"(?:backbone\.|model\.)?(?:(?P<embeddings>embeddings?)|(?P<head>head|norm_f|lm_head))(?:\.|$)(.*)"
)


class LayerName(NamedTuple):
    """Which part of the model a parameter, a node or a pool belongs to, parsed from its name."""

    part: str
    """`layers.7`, `embeddings` or `head` (the final norm and the projection onto the vocabulary)."""
    layer: int | None
    """The layer's index in the checkpoint; None for the embeddings and the head."""
    inner: str
    """What follows in the name: `mixer.in_proj.weight`, or the kind of a pool."""

    @classmethod
    def parse(cls, name: str) -> LayerName | None:
        """The part that a name belongs to; None for constants, step inputs and multi-token prediction (`mtp.*`)."""
        if match := _LAYER.fullmatch(name):
            return cls(f"layers.{match[1]}", int(match[1]), match[2])
        if match := _POOL.fullmatch(name):
            return cls(f"layers.{match[2]}", int(match[2]), match[1])
        if match := _ENDS.fullmatch(name):
            return cls(EMBEDDINGS if match["embeddings"] else HEAD, None, match[3])
        return None
