"""The plugin library for a build's GPUs and dtypes: the installation's own, or made of kernels compiled here."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path

from nemotrt.exporter.config import BuildConfig
from nemotrt.exporter.errors import CompileError
from nemotrt.plugins.kernel_index import KernelError
from nemotrt.plugins.kernel_store import cache_folder, digest
from nemotrt.plugins.library import PluginError, PluginLibrary
from nemotrt.plugins.shipped import is_shipped, shipped_library

Report = Callable[[int, int, str], None]
"""Takes how many kernels are compiled, of how many, and the latest."""


def kernel_dtypes(config: BuildConfig) -> tuple[str, ...]:
    """The dtypes whose kernels a model of this configuration launches, as `plugins.build` names them."""
    # FP32 is in every selection, where it is the state's beside a narrower dtype.
    state = () if config.state_dtype in ("fp32", config.precision) else (config.state_dtype,)
    weights = ("fp8", "bf16") if config.precision == "fp8" else (config.precision,)
    return (*weights, *state)


def plugin_library(
    config: BuildConfig, sms: Sequence[int], report: Report = lambda *_: None
) -> PluginLibrary:
    """A library with the kernels for these SMs; only what was neither shipped nor ever compiled here is compiled.

    Raises CompileError where the shipped one was changed, a kernel cannot be compiled, or nothing can be linked.
    """
    try:
        if is_shipped() and set(sms) <= set((shipped := shipped_library()).description["sms"]):
            return shipped
        return _linked(config, sms, report)
    except (KernelError, PluginError) as error:
        raise CompileError(
            f"the plugin library cannot be made: {error}",
            hint="--runtime onnx builds the bundle without engines",
        ) from error


def is_at_hand(config: BuildConfig, sms: Sequence[int]) -> bool:
    """Whether a library for these SMs was shipped, or linked here before: by this version, or else it is made anew."""
    return is_shipped() or _place(config, sms).is_dir()


def _place(config: BuildConfig, sms: Sequence[int]) -> Path:
    name = digest([sorted(sms), sorted(kernel_dtypes(config))])[:16]
    return cache_folder() / "libraries" / name


def _linked(config: BuildConfig, sms: Sequence[int], report: Report) -> PluginLibrary:
    from nemotrt.plugins import build, link

    cache = cache_folder()
    cache.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="kernels-", dir=cache) as folder:
        index = build.build(Path(folder) / "kernels", sms, kernel_dtypes(config), report=report)
        return PluginLibrary(link.link(index, _place(config, sms)))
