"""The plugin library for a build's GPUs and dtypes: the installed one, or one of kernels compiled here."""

import os
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path

from nemotrt.exporter.config import BuildConfig
from nemotrt.exporter.errors import CompileError
from nemotrt.plugins.kernel_index import KernelError
from nemotrt.plugins.kernel_store import cache_folder, digest
from nemotrt.plugins.library import PluginError, PluginLibrary, is_shipped, shipped_library

Report = Callable[[int, int, str], None]
"""A callback for the number of kernels compiled, the total, and the name of the latest."""


def kernel_dtypes(config: BuildConfig) -> tuple[str, ...]:
    """The dtypes of the kernels that a model of this configuration launches, as `plugins.build` names them."""
    # Every selection has FP32, for a state that is wider than the model.
    state = () if config.state_dtype in ("fp32", config.precision) else (config.state_dtype,)
    weights = ("fp8", "bf16") if config.precision == "fp8" else (config.precision,)
    return (*weights, *state)


def plugin_library(
    config: BuildConfig, sms: Sequence[int], report: Report = lambda *_: None
) -> PluginLibrary:
    """A library with the kernels for these SMs; it compiles only kernels that are neither installed nor cached.

    Raises CompileError if the installed library was modified, or if a kernel or the library cannot be built.
    """
    try:
        if is_shipped() and set(sms) <= set((shipped := shipped_library()).description["sms"]):
            return shipped
        return _linked(config, sms, report)
    except (KernelError, PluginError) as error:
        raise CompileError(
            f"the plugin library cannot be built: {error}",
            hint="--runtime onnx builds the bundle without engines",
        ) from error


def is_at_hand(config: BuildConfig, sms: Sequence[int]) -> bool:
    """Whether a library for these SMs is installed, or was linked here by an earlier build."""
    return is_shipped() or os.path.isdir(_place(config, sms))  # False if it may not be read


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
