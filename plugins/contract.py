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
    """A tensor's element type, with its name in each library; its value is PyTorch's and NumPy's name."""

    label: str
    """The name in messages and reports: `BF16`."""
    itemsize: int
    """Bytes per element."""
    onnx: int
    """The number of `onnx.TensorProto.DataType`, which is onnx_ir's `DataType` too."""
    safetensors: str
    """The name in a safetensors header: `BF16`."""
    triton: str
    """The type of a kernel parameter in Triton: `bf16`; empty if Triton has none."""
    tensorrt: int
    """The number of `nvinfer1::DataType`; -1 if TensorRT has none."""

    def __new__(
        cls,
        name: str,
        label: str = "",
        itemsize: int = 0,
        onnx: int = 0,
        safetensors: str = "",
        triton: str = "",
        tensorrt: int = -1,
    ) -> Self:
        """A member, created from its row below; the defaults let type checkers accept `DType(name)`."""
        dtype = str.__new__(cls, name)
        dtype._value_ = name
        dtype.label, dtype.itemsize, dtype.onnx = label, itemsize, onnx
        dtype.safetensors, dtype.triton, dtype.tensorrt = safetensors, triton, tensorrt
        return dtype

    FLOAT64 = "float64", "FP64", 8, 11, "F64", "fp64", -1
    FLOAT32 = "float32", "FP32", 4, 1, "F32", "fp32", 0
    FLOAT16 = "float16", "FP16", 2, 10, "F16", "fp16", 1
    BFLOAT16 = "bfloat16", "BF16", 2, 16, "BF16", "bf16", 7
    FLOAT8_E4M3 = "float8_e4m3fn", "FP8", 1, 17, "F8_E4M3", "fp8e4nv", 6
    FLOAT8_E5M2 = "float8_e5m2", "FP8 (E5M2)", 1, 19, "F8_E5M2", "fp8e5", -1
    FLOAT8_E8M0 = "float8_e8m0fnu", "FP8 (E8M0)", 1, 24, "F8_E8M0", "", 11
    INT64 = "int64", "INT64", 8, 7, "I64", "i64", 8
    INT32 = "int32", "INT32", 4, 6, "I32", "i32", 3
    INT16 = "int16", "INT16", 2, 5, "I16", "i16", -1
    INT8 = "int8", "INT8", 1, 3, "I8", "i8", 2
    UINT8 = "uint8", "UINT8", 1, 2, "U8", "u8", 5
    BOOL = "bool", "BOOL", 1, 9, "BOOL", "i1", 4

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
    def lookup(cls, library: str, name: object) -> Self:
        """The dtype with this name (or number) in `onnx`, `safetensors` or `tensorrt`; raises ValueError if unknown."""
        for dtype in cls:
            if getattr(dtype, library) == name:
                return dtype
        raise ValueError(f"{name} is not a known dtype")

    @classmethod
    def from_torch(cls, dtype: pytorch.dtype) -> Self:
        """PyTorch's dtype; raises ValueError on one that has no name here."""
        return cls(str(dtype).removeprefix("torch."))


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
    """The shape of a slot, or of a page: [2, kv_heads, page_size, head_dim]."""

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
        """Tokens per page; 0 where rows are slots."""
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
