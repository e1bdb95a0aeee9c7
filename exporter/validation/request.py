"""How a bundle is to be judged again: what it is compared with, and through what it runs."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from nemotrt.exporter.errors import UsageError

FLAGS = {
    "checkpoint": "--checkpoint",
    "golden": "--golden",
    "against": "--against",
    "save_golden": "--save-golden",
    "engine": "--engine",
    "provider": "--provider",
    "text": "--eval",
    "base": "--base",
    "layers_alone": "--layers-alone",
    "bisect": "--bisect",
    "seed": "--seed",
    "drift_steps": "--drift-steps",
}

RECORDED = ("checkpoint", "save_golden", "text", "base", "layers_alone", "bisect", "drift_steps")
"""What PyTorch is needed for."""

EXCLUDED: dict[str, tuple[tuple[str, ...], str]] = {
    "golden": (("against", "seed", *RECORDED), "the golden is the reference"),
    "against": (RECORDED, "the other bundle is the reference"),
    "engine": (("provider", "text", "base", "layers_alone"), "{other} is of the graph in ONNX Runtime"),
    "provider": (("text", "base", "bisect"), "{other} runs the graph on the CPU"),
    "layers_alone": (("provider", "text", "save_golden", "drift_steps"), "{other} is of the whole model"),
}
"""A request → those that cannot be meant beside it, and why."""


@dataclass(frozen=True)
class ValidationRequest:
    """One call of `validate`; raises UsageError on requests that exclude one another."""

    bundle: Path
    checkpoint: Path | None = None
    golden: Path | None = None
    against: Path | None = None
    save_golden: Path | None = None
    engine: bool = False
    provider: str | None = None
    """What ONNX Runtime runs the graph on, `cpu` where it is not said."""
    base: Path | None = None
    text: Path | None = None
    layers_alone: bool = False
    bisect: bool = False
    seed: int | None = None
    drift_steps: int | None = None

    def __post_init__(self) -> None:
        for one, (others, reason) in EXCLUDED.items():
            for other in others:
                if self._is_given(one) and self._is_given(other):
                    why = reason.format(other=FLAGS[other])
                    raise UsageError(f"{FLAGS[one]} and {FLAGS[other]} exclude each other: {why}")

    def _is_given(self, name: str) -> bool:
        value = getattr(self, name)
        return value is not None and value is not False
