"""The options of `validate`: what a bundle is compared with, and what runs it."""

from dataclasses import dataclass
from pathlib import Path

from nemotrt.exporter.config import accept_str_paths
from nemotrt.exporter.errors import UsageError

PYTORCH_ONLY = ("checkpoint", "save_golden", "text", "base", "layers_alone", "bisect", "drift_steps")
"""Options that need PyTorch as the reference."""

EXCLUDED: dict[str, tuple[tuple[str, ...], str]] = {
    "golden": (("against", "seed", *PYTORCH_ONLY), "the reference file is the reference"),
    "against": (PYTORCH_ONLY, "the other bundle is the reference"),
    "engine": (("provider", "text", "base", "layers_alone"), "{other} is for the graph in ONNX Runtime"),
    "provider": (("text", "base", "bisect"), "{other} runs the graph on the CPU"),
    "layers_alone": (("provider", "text", "save_golden", "drift_steps"), "{other} needs the whole model"),
}
"""For each option, the options that cannot be combined with it, and why."""


@dataclass(frozen=True)
class ValidationRequest:
    """One call of `validate`; raises UsageError on options that cannot be combined."""

    bundle: Path
    checkpoint: Path | None = None
    golden: Path | None = None
    against: Path | None = None
    save_golden: Path | None = None
    engine: bool = False
    provider: str | None = None
    """What ONNX Runtime runs the graph on; None means `cpu`."""
    base: Path | None = None
    text: Path | None = None
    layers_alone: bool = False
    bisect: bool = False
    seed: int | None = None
    drift_steps: int | None = None

    def __post_init__(self) -> None:
        accept_str_paths(self, "bundle", "checkpoint", "golden", "against", "save_golden", "base", "text")
        for option, (others, reason) in EXCLUDED.items():
            for other in others:
                if self._is_given(option) and self._is_given(other):
                    flag, other_flag = _flag(option), _flag(other)
                    raise UsageError(
                        f"{flag} and {other_flag} exclude each other: {reason.format(other=other_flag)}"
                    )

    def _is_given(self, option: str) -> bool:
        value = getattr(self, option)
        return value is not None and value is not False


def _flag(option: str) -> str:
    return "--eval" if option == "text" else f"--{option.replace('_', '-')}"
