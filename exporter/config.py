"""What a build was asked for: one frozen dataclass, checked once, that every stage reads."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from nemotrt.exporter.errors import UsageError
from nemotrt.plugins.contract import DType

PRECISIONS = ("fp32", "fp16", "bf16", "fp8")
"""Precisions of activations and weights; fp8 has BF16 wherever no FP8 is."""

RUNTIMES = ("auto", "onnx", "tensorrt-rtx", "tensorrt")
"""What a bundle can be run by; auto is the best that this machine can build."""

WEIGHTS = ("copy", "link")
"""Into the bundle's own data file, or left in the checkpoint's files, which the bundle links."""

PRESETS = ("conservative", "published")
"""What is left unquantized where FP8 is made here: `presets.py` says which modules."""

COMPUTE_DTYPES = {
    "fp32": DType.FLOAT32,
    "fp16": DType.FLOAT16,
    "bf16": DType.BFLOAT16,
    "fp8": DType.BFLOAT16,
}
PRECISION_OF_DTYPE = {DType.FLOAT32: "fp32", DType.FLOAT16: "fp16", DType.BFLOAT16: "bf16"}


DRIFT_STEPS, BUILD_DRIFT_STEPS = 1000, 100
"""Decode steps over which `validate` measures what the carried state loses, and over which a build does."""


@dataclass(frozen=True)
class BuildConfig:
    """Everything that decides what a build writes; raises UsageError on what cannot be meant."""

    checkpoint: Path
    output: Path
    precision: str = ""
    """One of PRECISIONS, or empty for the checkpoint's own."""
    max_tokens: int = 2048
    """Tokens a step (T)."""
    max_sequences: int = 16
    """Sequences a step (B)."""
    max_context: int = 8192
    """Tokens a sequence."""
    page_size: int = 128
    """Tokens a page of the KV cache."""
    runtime: str = "auto"
    """One of RUNTIMES: what the bundle is to be run by."""
    sms: tuple[int, ...] = ()
    """GPU generations that an engine of tensorrt-rtx is for; none for all that the precision runs on."""
    layers: str = ""
    """Which layers of the checkpoint to take, as `layer_selection` reads it; empty for all."""
    weights: str = "copy"
    """One of WEIGHTS: what becomes of tensors that the graph takes as the checkpoint has them."""
    state_dtype: str = "fp32"
    """Of the recurrent state's pools."""
    calibration: Path | None = None
    """Text to calibrate FP8 on; none for the built-in text."""
    preset: str = PRESETS[0]
    """One of PRESETS: what a model that is quantized here keeps unquantized."""
    exclude: tuple[str, ...] = ()
    """Patterns of modules to leave unquantized, beside the preset's."""
    kv_dtype: str = "auto"
    """Of the KV cache: fp8, bf16, or auto: fp8 where the model is quantized here, else as the checkpoint says."""
    validate: bool = True
    force: bool = False
    keep_failed: bool = False

    def __post_init__(self) -> None:
        if self.precision not in ("", *PRECISIONS):
            raise UsageError(
                f"precision {self.precision} is not known", hint="choose from " + ", ".join(PRECISIONS)
            )
        if self.runtime not in RUNTIMES:
            raise UsageError(
                f"runtime {self.runtime} is not known", hint="choose from " + ", ".join(RUNTIMES)
            )
        for name in ("max_tokens", "max_sequences", "max_context", "page_size"):
            if getattr(self, name) < 1:
                raise UsageError(
                    f"--{name.replace('_', '-')} is {getattr(self, name)}; it must be at least 1"
                )
        if self.max_sequences > self.max_tokens:
            raise UsageError(
                f"--max-sequences {self.max_sequences} is more than --max-tokens {self.max_tokens}",
                hint="a decode step takes one token of each sequence",
            )
        if self.page_size & (self.page_size - 1):
            raise UsageError(f"--page-size {self.page_size} is not a power of two")
