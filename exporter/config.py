"""The options of a build: one frozen dataclass, checked once, that every stage reads."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path

from nemotrt.exporter.errors import UsageError
from nemotrt.plugins.contract import DType


class Precision(StrEnum):
    """Precision of activations and weights; FP8 computes in BF16 where there is no FP8 kernel."""

    FP32 = "fp32"
    FP16 = "fp16"
    BF16 = "bf16"
    FP8 = "fp8"

    @classmethod
    def of(cls, dtype: str) -> Precision:
        """The precision that computes in a dtype."""
        return cls(DType(dtype).label.lower())

    @property
    def dtype(self) -> DType:
        """The dtype of activations, and of weights that are not quantized."""
        label = "BF16" if self is Precision.FP8 else self.name
        return next(dtype for dtype in DType if dtype.label == label)


PRECISIONS = tuple(precision.value for precision in Precision)
"""From the finest to the coarsest."""

RUNTIMES = ("auto", "onnx", "tensorrt-rtx", "tensorrt")
"""What runs the bundle; `auto` is the best runtime that this machine can build for."""

WEIGHTS = ("copy", "link")
"""Copy weights to the bundle's data file, or clone or hard-link the checkpoint's files into the bundle."""

PRESETS = ("conservative", "published")
"""Which modules stay unquantized when this tool quantizes: `quantization/presets.py` lists them."""

STATE_DTYPES, KV_DTYPES = ("fp32", "fp16"), ("auto", "fp8", "bf16")

MAX_INT32 = (1 << 31) - 1
"""A graph's inputs count tokens, sequences and pages in INT32."""

DRIFT_STEPS, BUILD_DRIFT_STEPS = 1000, 100
"""Decode steps over which `validate`, and a build, measure the drift of the recurrent state."""


@dataclass(frozen=True)
class BuildConfig:
    """Everything that decides what a build writes; raises UsageError on a value that is out of range."""

    checkpoint: Path
    output: Path
    precision: str = ""
    """One of PRECISIONS; empty selects the checkpoint's."""
    max_tokens: int = 2048
    """Tokens in a step (T)."""
    max_sequences: int = 16
    """Sequences in a step (B)."""
    max_context: int = 8192
    """Tokens in a sequence."""
    page_size: int = 128
    """Tokens in a page of the KV cache."""
    runtime: str = "auto"
    """One of RUNTIMES."""
    sms: tuple[int, ...] = ()
    """GPU generations that a tensorrt-rtx engine supports; empty selects all that the precision runs on."""
    layers: str = ""
    """The layers to export, in the syntax of `checkpoint/layer_selection.py`; empty selects all."""
    ignore_fields: tuple[str, ...] = ()
    """Unknown fields of config.json that are no error, because the model computes the same without them."""
    allow_zero_weights: bool = False
    """Accept weights that are zero where trained weights are not, which would be refused."""
    weights: str = "copy"
    """One of WEIGHTS: how tensors that need no conversion get into the bundle."""
    state_dtype: str = "fp32"
    """One of STATE_DTYPES: the dtype of the recurrent state."""
    calibration: Path | None = None
    """Text for FP8 calibration; None selects the built-in text."""
    preset: str = PRESETS[0]
    """One of PRESETS."""
    exclude: tuple[str, ...] = ()
    """Patterns of modules to leave unquantized, in addition to the preset's."""
    kv_dtype: str = "auto"
    """One of KV_DTYPES; `auto` is fp8 if the model is quantized here, else what the checkpoint says."""
    validate: bool = True
    force: bool = False
    keep_failed: bool = False

    def __post_init__(self) -> None:
        accept_str_paths(self, "checkpoint", "output", "calibration")
        choices = {
            "precision": ("", *PRECISIONS),
            "runtime": RUNTIMES,
            "weights": WEIGHTS,
            "preset": PRESETS,
            "state_dtype": STATE_DTYPES,
            "kv_dtype": KV_DTYPES,
        }
        for name, values in choices.items():
            if getattr(self, name) not in values:
                raise UsageError(
                    f"{_flag(name)} {getattr(self, name)} is unknown",
                    hint="choose from " + ", ".join(filter(None, values)),
                )
        for name in ("max_tokens", "max_sequences", "max_context", "page_size"):
            if not 1 <= getattr(self, name) <= MAX_INT32:
                limit = "at least 1" if getattr(self, name) < 1 else f"at most {MAX_INT32}"
                raise UsageError(f"{_flag(name)} is {getattr(self, name)}; it must be {limit}")
        if self.max_sequences > self.max_tokens:
            raise UsageError(
                f"--max-sequences {self.max_sequences} is more than --max-tokens {self.max_tokens}",
                hint="a decode step takes one token of each sequence",
            )
        if self.page_size & (self.page_size - 1):
            raise UsageError(f"--page-size {self.page_size} is not a power of two")

    @property
    def dtype(self) -> DType:
        """The dtype of activations, and of weights that are not quantized."""
        return Precision(self.precision).dtype

    @property
    def state(self) -> DType:
        """The dtype of the recurrent state."""
        return Precision(self.state_dtype).dtype


def accept_str_paths(options: object, *names: str) -> None:
    """Replace a str in these fields of a frozen dataclass by a Path: callers of the library pass either."""
    for name in names:
        if isinstance(value := getattr(options, name), str):
            object.__setattr__(options, name, Path(value))


def _flag(name: str) -> str:
    return "--" + name.replace("_", "-")
