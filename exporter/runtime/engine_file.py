"""A bundle's engine, opened on this machine's GPU: everything that can be wrong with it is said before it is loaded."""

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
    """A deserialised engine with what must live as long as it does."""

    backend: Backend
    trt: ModuleType
    engine: Any
    """trt.ICudaEngine."""
    runtime: Any
    """trt.Runtime; holds the plugins."""
    log: Any
    """trt.ILogger; `reasons` has TensorRT's errors."""


def engine_profile(bundle: Path, manifest: Manifest) -> Profile:
    """The manifest's entry of the bundle's engine; raises BundleError where there is none."""
    names = [one.runtime for one in BACKENDS]
    found = next((profile for profile in manifest.profiles if profile.runtime in names), None)
    if found is None:
        raise BundleError(
            f"{bundle} has no TensorRT engine", hint="build it with --runtime tensorrt-rtx or tensorrt"
        )
    return found


def open_engine(bundle: Path, manifest: Manifest, profile: Profile, gpu: Gpu) -> OpenEngine:
    """The engine on the current GPU; raises BundleError that names what does not fit.

    The engine and its plugin library hold code that will run: both are compared with their hashes first.
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
    """The bundle's plugin libraries; raises BundleError where one is not what was built."""
    for plugin in manifest.plugins:
        _check_hash(bundle, manifest, plugin.path)
    return tuple(bundle / plugin.path for plugin in manifest.plugins)


def load_engine(used: Backend, libraries: Sequence[Path], path: Path) -> OpenEngine:
    """An engine that is known to be trusted, as its libraries are; raises BundleError where it does not load."""
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
    """An execution context whose scratch memory is the caller's; raises BundleError where there is none."""
    trt, engine = opened.trt, opened.engine
    strategy = trt.ExecutionContextAllocationStrategy.USER_MANAGED
    if opened.backend.compiles_when_run:
        config = engine.create_runtime_config()
        config.set_execution_context_allocation_strategy(strategy)
        # A kernel that is compiled in the background would be exchanged after its graph was captured.
        config.dynamic_shapes_kernel_specialization_strategy = (
            trt.DynamicShapesKernelSpecializationStrategy.EAGER
        )
        handle = engine.create_execution_context(config)
    else:
        handle = engine.create_execution_context(strategy)
    if handle is None:
        raise BundleError(f"TensorRT makes no execution context: {because(opened.log)}")
    return handle


def _check_hash(bundle: Path, manifest: Manifest, name: str) -> None:
    file = next(file for file in manifest.files if file.path == name)
    path = bundle / name
    if sha256(path) != file.sha256:
        raise BundleError(f"{path} was changed after it was built", hint="copy or build the bundle again")


def _deserialize(runtime: Any, path: Path) -> Any:
    """The engine, read from the mapped file: no copy of it is made."""
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content:
        return runtime.deserialize_cuda_engine(content)


def because(log: Any) -> str:
    """What TensorRT's errors said since the last call, in one line."""
    said = "; ".join(dict.fromkeys(log.reasons)) or "it gave no reason"
    log.reasons.clear()
    return said


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
