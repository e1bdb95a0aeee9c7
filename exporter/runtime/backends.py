"""The two runtimes with one API, TensorRT and TensorRT-RTX, and a table of their differences."""

from dataclasses import dataclass
from importlib import import_module
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType
from typing import IO, Any

from nemotrt.exporter.errors import BundleError, CompileError

LAYERS = "Engine Layer Information"
"""The first words of the log message that lists an engine's layers; it appears at the highest verbosity."""

MAX_REASONS = 3
"""Errors of TensorRT that are quoted in one of ours."""


@dataclass(frozen=True)
class Backend:
    """A runtime: its names, the GPUs that it builds for, and what its builder needs."""

    runtime: str
    """Its name as a value of --runtime."""
    title: str
    module: str
    """The name of its Python module."""
    distributions: tuple[str, ...]
    """The packages that may contain the module; an installed one has its version."""
    extra: str
    """The extra of nemo-export that installs it."""
    min_major: int
    """The first major version with every feature used here."""
    libraries: str
    """The package with its shared libraries."""
    sms: tuple[int, ...] = ()
    """GPU generations that it can build for on any machine; empty if it builds for the machine's own GPU."""
    keeps_timings: bool = False
    """Whether its builder times kernels on the GPU, so that a timing cache saves time."""
    compiles_when_run: bool = False
    """Whether its engines are compiled for the GPU when a context is created, as the context's config says."""
    flags: tuple[str, ...] = ()
    """Additional builder flags."""
    linked: str = ""
    """A library that its ONNX parser opens by this name for the first plugin node, and aborts if it is not found. The
    wheel has the library only under a name with its version. Empty if the parser opens none."""

    @property
    def needs_gpu(self) -> bool:
        """Whether its builder needs a GPU."""
        return not self.sms

    @property
    def engine(self) -> str:
        """The path of its engine in a bundle."""
        return f"engines/{self.runtime}.engine"


BACKENDS = (
    Backend(
        runtime="tensorrt",
        title="TensorRT",
        module="tensorrt",
        distributions=("tensorrt", "tensorrt-cu13", "tensorrt-cu12"),
        extra="tensorrt",
        min_major=11,
        libraries="tensorrt_libs",
        keeps_timings=True,
    ),
    Backend(
        runtime="tensorrt-rtx",
        title="TensorRT-RTX",
        module="tensorrt_rtx",
        distributions=("tensorrt-rtx-cu13", "tensorrt-rtx-cu12", "tensorrt-rtx"),
        extra="rtx",
        min_major=1,
        libraries="tensorrt_rtx_libs",
        sms=(75, 80, 86, 89, 120, 121),
        # A timing cache is deprecated and without effect since TensorRT-RTX 1.2.
        compiles_when_run=True,
        flags=("REQUIRE_USER_ALLOCATION",),  # or a step may allocate, which a CUDA graph cannot
        linked="libtensorrt_rtx.so",
    ),
)
"""In order of preference: `--runtime auto` uses the first that works on the machine."""


def backend(runtime: str) -> Backend:
    """The backend with this name."""
    return next(backend for backend in BACKENDS if backend.runtime == runtime)


def installed_version(backend: Backend) -> str:
    """The module's version from its package's metadata; empty if it is not installed."""
    if find_spec(backend.module) is None:
        return ""
    for name in backend.distributions:
        try:
            return version(name)
        except PackageNotFoundError:
            continue
    return "of unknown version"


def missing(backend: Backend) -> str:
    """What is missing before the backend can be used, for an error; empty if nothing is missing."""
    installed = installed_version(backend)
    if not installed:
        return f"{backend.title} is not installed (no Python module {backend.module})"
    major = installed.partition(".")[0]
    if major.isdigit() and int(major) < backend.min_major:
        return f"{backend.title} {installed} is installed, {backend.min_major} or later is needed"
    return ""


def load_module(backend: Backend) -> ModuleType:
    """The backend's Python module; raises BundleError with what is missing."""
    hint = f"pip install 'nemo-export[{backend.extra}]'"
    if problem := missing(backend):
        raise BundleError(problem, hint=hint)
    try:
        return import_module(backend.module)
    except (ImportError, OSError) as error:
        raise BundleError(
            f"{backend.title}'s module is installed, but its libraries are not: {error}", hint=hint
        ) from error


def linked_library(backend: Backend) -> Path:
    """The installed file of `backend.linked`; raises CompileError if there is none."""
    spec = find_spec(backend.libraries)
    folders = list(spec.submodule_search_locations or ()) if spec else []
    for folder in folders:
        for path in sorted(Path(folder).glob(f"{backend.linked}*")):
            return path.resolve()
    raise CompileError(
        f"{backend.title}'s libraries are not installed (no {backend.linked} in {backend.libraries})",
        hint=f"pip install 'nemo-export[{backend.extra}]'",
    )


def new_log(trt: ModuleType, file: IO[str] | None = None) -> Any:
    """A TensorRT logger that keeps errors in `reasons` and an engine's `layers`, and writes everything to `file`."""
    error = trt.ILogger.Severity.ERROR

    class Log(trt.ILogger):  # type: ignore[name-defined,misc]
        def __init__(self) -> None:
            trt.ILogger.__init__(self)
            self.reasons: list[str] = []
            self.layers: list[str] = []

        def log(self, severity: Any, message: str) -> None:
            if file:
                file.write(f"[{severity.name}] {message}\n")
            if severity <= error:
                self.reasons.append(" ".join(message.split()))
            elif message.startswith(LAYERS):
                self.layers += message.splitlines()[1:]

    return Log()


def because(log: Any, *more: str) -> str:
    """TensorRT's first errors since the last call, and `more`, in one line."""
    reasons = list(dict.fromkeys([*log.reasons, *more]))
    log.reasons.clear()
    return "; ".join(reasons[:MAX_REASONS]) or "it gave no reason"
