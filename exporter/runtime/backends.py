"""TensorRT and TensorRT-RTX: one API in two Python modules, and all in which they differ, in one table."""

from __future__ import annotations

import os
import tempfile
from dataclasses import dataclass
from importlib import import_module
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType

from nemotrt.exporter.errors import BundleError, CompileError


@dataclass(frozen=True)
class Backend:
    """One of the two: its names, what it can build for, and what its builder needs."""

    runtime: str
    """As --runtime names it."""
    title: str
    module: str
    """The Python module's name."""
    distributions: tuple[str, ...]
    """The packages that hold the module, any of which tells its version."""
    extra: str
    """What installs it."""
    sms: tuple[int, ...]
    """GPU generations that it builds for on any machine; none where it builds for the machine's GPU."""
    least_major: int
    """Its first major version with all that is used here."""
    keeps_timings: bool
    """Whether its builder times kernels on the GPU, and a timing cache saves doing it again."""
    compiles_when_run: bool
    """Whether its engines are compiled for the GPU when they are run, by a strategy that a context is given."""
    flags: tuple[str, ...]
    """Builder flags that it takes on top of what both do without."""
    libraries: str
    """The package that holds its shared libraries."""
    linked: str
    """A library that its ONNX parser opens by this bare name as soon as a node is a plugin, or else ends the
    process; the wheel has it only with its version appended. Empty where there is no such need."""

    @property
    def needs_gpu(self) -> bool:
        """Whether its builder runs only where there is a GPU."""
        return not self.sms

    @property
    def engine(self) -> str:
        """Where its engine lies in a bundle."""
        return f"engines/{self.runtime}.engine"


BACKENDS = (
    Backend(
        runtime="tensorrt",
        title="TensorRT",
        module="tensorrt",
        distributions=("tensorrt", "tensorrt-cu13", "tensorrt-cu12"),
        extra="tensorrt",
        sms=(),
        least_major=11,
        keeps_timings=True,
        compiles_when_run=False,
        flags=(),
        libraries="tensorrt_libs",
        linked="",
    ),
    Backend(
        runtime="tensorrt-rtx",
        title="TensorRT-RTX",
        module="tensorrt_rtx",
        distributions=("tensorrt-rtx-cu13", "tensorrt-rtx-cu12", "tensorrt-rtx"),
        extra="rtx",
        sms=(75, 80, 86, 89, 120, 121),
        least_major=1,
        keeps_timings=False,  # deprecated and without effect since TensorRT-RTX 1.2
        compiles_when_run=True,
        flags=("REQUIRE_USER_ALLOCATION",),  # or a step may allocate, which a CUDA graph cannot
        libraries="tensorrt_rtx_libs",
        linked="libtensorrt_rtx.so",
    ),
)
"""In order of preference: the first that a machine can use is what `--runtime auto` takes."""


def backend(runtime: str) -> Backend:
    """The backend of that name."""
    return next(backend for backend in BACKENDS if backend.runtime == runtime)


def installed_version(backend: Backend) -> str:
    """The module's version as its package says it, without importing it; empty where it is not installed."""
    if find_spec(backend.module) is None:
        return ""
    for name in backend.distributions:
        try:
            return version(name)
        except PackageNotFoundError:
            continue
    return "of unknown version"


def missing(backend: Backend) -> str:
    """What must be installed before the backend can be used, in words; empty where nothing is missing."""
    found = installed_version(backend)
    if not found:
        return f"{backend.title} is not installed (no Python module {backend.module})"
    major = found.partition(".")[0]
    if major.isdigit() and int(major) < backend.least_major:
        return f"{backend.title} {found} is installed, {backend.least_major} or later is needed"
    return ""


def load_module(backend: Backend) -> ModuleType:
    """The backend's Python module; raises BundleError that says what is missing."""
    hint = f"pip install 'nemo-export[{backend.extra}]'"
    if problem := missing(backend):
        raise BundleError(problem, hint=hint)
    try:
        return import_module(backend.module)
    except (ImportError, OSError) as error:
        raise BundleError(
            f"{backend.title}'s module is installed, and its libraries are not: {error}", hint=hint
        ) from error


def library_path(backend: Backend, cache: Path) -> Path | None:
    """A folder for LD_LIBRARY_PATH in which the linked library has its bare name; None where none is needed.

    The loader reads the variable when a process starts, so it is for a child process.
    """
    if not backend.linked:
        return None
    target = _library(backend)
    folder = cache / "lib"
    link = folder / backend.linked
    folder.mkdir(parents=True, exist_ok=True)
    if not (link.is_symlink() and link.readlink() == target):
        with tempfile.TemporaryDirectory(dir=folder) as temporary:
            fresh = Path(temporary) / backend.linked
            fresh.symlink_to(target)
            os.replace(fresh, link)
    return folder


def _library(backend: Backend) -> Path:
    spec = find_spec(backend.libraries)
    folders = list(spec.submodule_search_locations or ()) if spec else []
    for folder in folders:
        for path in sorted(Path(folder).glob(f"{backend.linked}*")):
            return path.resolve()
    raise CompileError(
        f"{backend.title}'s libraries are not installed (no {backend.linked} in {backend.libraries})",
        hint=f"pip install 'nemo-export[{backend.extra}]'",
    )
