"""The application: builds, validates and runs bundles. `docs/api.md` shows its use as a library."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from nemotrt.exporter.config import BuildConfig
    from nemotrt.exporter.errors import ExportError
    from nemotrt.exporter.generation.generate import GenerateConfig, generate
    from nemotrt.exporter.pipelines.build import build
    from nemotrt.exporter.pipelines.quantize import quantize_checkpoint as quantize
    from nemotrt.exporter.pipelines.validate import revalidate as validate
    from nemotrt.exporter.runtime.session import Session
    from nemotrt.exporter.validation.request import ValidationRequest

__all__ = [
    "BuildConfig",
    "ExportError",
    "GenerateConfig",
    "Session",
    "ValidationRequest",
    "build",
    "generate",
    "quantize",
    "validate",
]

_SOURCES = {
    "BuildConfig": "config:BuildConfig",
    "ExportError": "errors:ExportError",
    "GenerateConfig": "generation.generate:GenerateConfig",
    "Session": "runtime.session:Session",
    "ValidationRequest": "validation.request:ValidationRequest",
    "build": "pipelines.build:build",
    "generate": "generation.generate:generate",
    "quantize": "pipelines.quantize:quantize_checkpoint",
    "validate": "pipelines.validate:revalidate",
}
"""A public name → its module and its name there. Modules are imported on first use, because some load PyTorch."""


def __getattr__(name: str) -> Any:
    if name not in _SOURCES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    module, _, attribute = _SOURCES[name].partition(":")
    return getattr(import_module(f"{__name__}.{module}"), attribute)
