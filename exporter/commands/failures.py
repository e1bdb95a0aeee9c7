"""Explains errors of libraries and of the system: packages that are missing or broken, and memory that runs out."""

import errno
import math
import traceback
from types import ModuleType

from nemotrt.exporter.environment import address_space_limit
from nemotrt.exporter.errors import ExportError, UsageError

BUILD, CPU, SERVE, PLAIN = "'nemo-export[build]'", "'nemo-export[cpu]'", "'nemo-export[serve]'", "nemo-export"

PACKAGES = {
    **dict.fromkeys(("torch", "polygraphy"), BUILD),
    "onnxruntime": CPU,
    "llguidance": SERVE,
    **dict.fromkeys(
        (
            "google",
            "google.protobuf",
            "jinja2",
            "ml_dtypes",
            "numpy",
            "onnx",
            "onnx_ir",
            "rich",
            "tokenizers",
        ),
        PLAIN,
    ),
}
"""Modules of the packages that this one imports → what pip installs them with."""

NO_MEMORY = ("allocate memory", "bad_alloc", "failed to map segment", "Failed to allocate", "out of memory")
"""How libraries say that memory ran out."""

NO_THREAD = "can't start new thread"
"""How Python says that a limit on threads is reached; for a process it is EAGAIN."""

ADDRESS_SPACE = {
    **dict.fromkeys(("build", "check", "quantize", "validate"), 1_500_000_000),
    "generate": 400_000_000,
    "inspect": 250_000_000,
}
"""Command → bytes of addresses that its libraries need; with fewer, some end the process without an exception.

Measured with two cores: 0.75 to 1.33 GB with PyTorch, 0.5 GB with ONNX Runtime and a small model, 0.24 GB with NumPy.
"""


def check_address_space(command: str) -> None:
    """Raise UsageError if a limit on addresses does not leave enough for the libraries of this command."""
    needed, limit = ADDRESS_SPACE.get(command, 0), address_space_limit()
    if limit < needed:
        raise UsageError(
            f"{command} needs {needed / 1e9:.2g} GB of address space, ulimit -v allows {limit / 1e9:.2g} GB",
            hint="raise the limit with ulimit -v; a limit of the control group does not count addresses",
        )


def explain(error: Exception, command: str) -> ExportError | None:
    """The error for a user, or None if it is not one of a package or of memory."""
    text = str(error)
    if isinstance(error, OSError) and error.errno is not None:  # the text names a file
        return _explain_errno(error.errno)
    if isinstance(error, ModuleNotFoundError) and error.name in PACKAGES:
        return UsageError(
            f"{command} needs {error.name}, which is not installed",
            hint=f"pip install {PACKAGES[error.name]}",
        )
    if name := _lacking(error):
        return UsageError(
            f"{name} is too old or incomplete: {text}", hint=f"pip install --upgrade {PACKAGES[name]}"
        )
    if isinstance(error, MemoryError) or any(part in text for part in NO_MEMORY):
        return _explain_errno(errno.ENOMEM)
    if NO_THREAD in text:
        return _explain_errno(errno.EAGAIN)
    if isinstance(error, ImportError | OSError) and (name := _broken(error)):
        return UsageError(
            f"{name} is installed, but cannot be imported: {text}",
            hint=f"pip install --force-reinstall {PACKAGES[name]}",
        )
    return None


def _explain_errno(number: int) -> ExportError | None:
    if number == errno.ENOMEM:
        return ExportError("out of memory", hint=_more_memory())
    if number == errno.EAGAIN:
        return ExportError(
            "the system starts no more threads or processes", hint="raise the limits (ulimit -u, ulimit -v)"
        )
    return None


def _more_memory() -> str:
    limit = address_space_limit()
    if math.isinf(limit):
        return "nemo-export check estimates what a build needs"
    return f"ulimit -v allows {limit / 1e9:.2g} GB of addresses: raise it"


def _lacking(error: Exception) -> str:
    """The package of PACKAGES in whose module a name does not exist; empty if the error is another one."""
    if isinstance(error, AttributeError) and isinstance(error.obj, ModuleType):
        module = error.obj.__name__
    elif isinstance(error, ImportError) and not isinstance(error, ModuleNotFoundError):
        is_name = str(error).startswith("cannot import name")
        module = str(error.name) if is_name else ""
    else:
        return ""
    package = module.partition(".")[0]
    return package if package in PACKAGES else ""


def _broken(error: ImportError | OSError) -> str:
    """The package of PACKAGES that lacks a module, or the first whose code was running; empty if there is none."""
    modules = [frame.f_globals.get("__name__", "") for frame, _ in traceback.walk_tb(error.__traceback__)]
    if isinstance(error, ModuleNotFoundError):
        modules.insert(0, error.name)
    packages = (str(name).partition(".")[0] for name in modules)
    return next((name for name in packages if name in PACKAGES), "")
