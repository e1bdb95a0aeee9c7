"""Opens a bundle's engine on this machine's GPU, after checking that both fit."""

from __future__ import annotations

import mmap
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

from nemotrt.exporter.errors import BundleError
from nemotrt.exporter.runtime.backends import BACKENDS, Backend, backend, load_module
from nemotrt.exporter.runtime.cuda import Gpu
from nemotrt.exporter.runtime.files import sha256
from nemotrt.exporter.runtime.manifest import Manifest, Profile

REBUILD = "build the bundle again on this machine, or with this machine's TensorRT"


@dataclass(frozen=True)
class OpenEngine:
    """A deserialized engine, and the objects that must live as long as it does."""

    backend: Backend
    trt: ModuleType
    engine: Any
    """trt.ICudaEngine."""
    runtime: Any
    """trt.Runtime, which owns the plugins."""
    log: Any
    """trt.ILogger, whose `reasons` are TensorRT's errors."""


def engine_profile(bundle: Path, manifest: Manifest) -> Profile:
    """The manifest's profile of the bundle's engine; raises BundleError if there is none."""
    names = [backend.runtime for backend in BACKENDS]
    for profile in manifest.profiles:
        if profile.runtime in names:
            return profile
    raise BundleError(
        f"{bundle} has no TensorRT engine", hint="build it with --runtime tensorrt-rtx or tensorrt"
    )


def open_engine(bundle: Path, manifest: Manifest, profile: Profile, gpu: Gpu) -> OpenEngine:
    """The engine on the current GPU; raises BundleError if it is for another GPU or TensorRT, or was modified.

    The engine and its plugin library contain code that will run, so their hashes are checked first.
    """
    used = backend(profile.runtime)
    if gpu.sm not in profile.sms:
        built = ", ".join(map(str, profile.sms))
        raise BundleError(f"{bundle} has an engine for SM {built}, {gpu.name} is SM {gpu.sm}", hint=REBUILD)
    trt = load_module(used)
    if trt.__version__ != profile.runtime_version:
        raise BundleError(
            f"{bundle}'s engine was built by {used.title} {profile.runtime_version},"
            f" installed is {trt.__version__}",
            hint=f"install {profile.runtime_version}, or {REBUILD}",
        )
    _check_hash(bundle, manifest, profile.path)
    return load_engine(used, check_libraries(bundle, manifest), bundle / profile.path)


def check_libraries(bundle: Path, manifest: Manifest) -> tuple[Path, ...]:
    """The bundle's plugin libraries; raises BundleError if one was modified after the build."""
    for plugin in manifest.plugins:
        _check_hash(bundle, manifest, plugin.path)
    return tuple(bundle / plugin.path for plugin in manifest.plugins)


def load_engine(used: Backend, libraries: Sequence[Path], path: Path) -> OpenEngine:
    """Load an engine and its plugin libraries, all trusted; raises BundleError if one does not load."""
    trt = load_module(used)
    log = _log(trt)
    runtime = trt.Runtime(log)
    for library in libraries:
        if runtime.get_plugin_registry().load_library(str(library)) is None:
            raise BundleError(f"{used.title} does not load {library}: {because(log)}")
    engine = _deserialize(runtime, path)
    if engine is None:
        raise BundleError(f"{used.title} does not load {path}: {because(log)}", hint=REBUILD)
    return OpenEngine(used, trt, engine, runtime, log)


def create_context(opened: OpenEngine) -> Any:
    """An execution context with scratch memory from the caller; raises BundleError if TensorRT creates none."""
    trt, engine = opened.trt, opened.engine
    strategy = trt.ExecutionContextAllocationStrategy.USER_MANAGED
    if opened.backend.compiles_when_run:
        config = engine.create_runtime_config()
        config.set_execution_context_allocation_strategy(strategy)
        # A kernel compiled in the background would replace the one that a CUDA graph has captured.
        config.dynamic_shapes_kernel_specialization_strategy = (
            trt.DynamicShapesKernelSpecializationStrategy.EAGER
        )
        handle = engine.create_execution_context(config)
    else:
        handle = engine.create_execution_context(strategy)
    if handle is None:
        raise BundleError(f"TensorRT creates no execution context: {because(opened.log)}")
    return handle


def _check_hash(bundle: Path, manifest: Manifest, name: str) -> None:
    file = next(file for file in manifest.files if file.path == name)
    path = bundle / name
    if sha256(path) != file.sha256:
        raise BundleError(f"{path} was changed after it was built", hint="copy or build the bundle again")


def _deserialize(runtime: Any, path: Path) -> Any:
    """The engine, deserialized from the mapped file without a copy."""
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content:
        return runtime.deserialize_cuda_engine(content)


def because(log: Any) -> str:
    """TensorRT's errors since the last call, in one line."""
    text = "; ".join(dict.fromkeys(log.reasons)) or "it gave no reason"
    log.reasons.clear()
    return text


def _log(trt: ModuleType) -> Any:
    error = trt.ILogger.Severity.ERROR

    class Log(trt.ILogger):  # type: ignore[name-defined,misc]
        def __init__(self) -> None:
            trt.ILogger.__init__(self)
            self.reasons: list[str] = []

        def log(self, severity: Any, message: str) -> None:
            if severity <= error:
                self.reasons.append(" ".join(message.split()))

    return Log()
