"""The runtime and the GPU generations that a build's engine is for, decided before any long work."""

import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.util import find_spec

from nemotrt.exporter.errors import CompileError, UsageError
from nemotrt.exporter.runtime.backends import BACKENDS, Backend, backend, missing
from nemotrt.exporter.runtime.cuda import CudaError, find_gpu
from nemotrt.plugins.library import is_shipped
from nemotrt.plugins.variant import SMS, supports_fp8

ONNX = "onnx"
AUTO = "auto"


@dataclass(frozen=True)
class Target:
    """A runtime (one of config.RUNTIMES except auto), the SMs that its engine is for, and why it was chosen."""

    runtime: str
    sms: tuple[int, ...] = ()
    why: str = ""
    may_fall_back: bool = False
    """Whether a build may continue without an engine, and report it: the user did not request this runtime."""

    @property
    def gpus(self) -> str:
        """The GPU generations, as text."""
        return "SM " + ", ".join(map(str, self.sms))

    @property
    def title(self) -> str:
        """The runtime, and its GPU generations if it has any."""
        return f"{self.runtime} for {self.gpus}" if self.sms else self.runtime


def settle(runtime: str, sms: Sequence[int], precision: str) -> Target:
    """The target of a build; raises UsageError or CompileError if it is impossible, with what to do instead.

    `auto` chooses the first backend that this machine can build for; Target.why has the problems with the others.
    """
    if runtime == ONNX:
        if sms:
            raise UsageError("--sm has no effect with --runtime onnx", hint="leave one of them out")
        return Target(ONNX)
    if runtime != AUTO:
        return _target(backend(runtime), sms, precision)
    refusals = []
    for candidate in BACKENDS:
        if sms and candidate.needs_gpu:
            continue  # it builds for this machine's GPU only
        try:
            target = _target(candidate, sms, precision)
        except CompileError as error:
            if sms:
                raise
            refusals.append(str(error))
            continue
        return Target(target.runtime, target.sms, "; ".join(refusals), may_fall_back=not sms)
    return Target(ONNX, (), "; ".join(refusals))


def _target(candidate: Backend, sms: Sequence[int], precision: str) -> Target:
    if candidate.needs_gpu and sms:
        raise UsageError(
            f"--sm goes with --runtime tensorrt-rtx: {candidate.title} builds for the GPU of this machine only",
            hint="leave --sm out",
        )
    for sm in sms:
        _check_sm(candidate, sm, precision)
    if problem := missing(candidate):
        raise CompileError(problem, hint=f"pip install 'nemo-export[{candidate.extra}]'")
    if candidate.needs_gpu:
        try:
            device = find_gpu()
        except CudaError as error:
            raise CompileError(
                f"{candidate.title} builds engines on a GPU only: {error}",
                hint="build on the GPU's machine; --runtime tensorrt-rtx builds engines for RTX GPUs anywhere",
            ) from error
        try:
            _check_kernels(device.sm, precision)
        except UsageError as error:  # the user did not choose this GPU
            raise CompileError(f"{device.name}: {error}", hint=error.hint) from error
        return Target(candidate.runtime, (device.sm,))
    check_can_link()
    return Target(candidate.runtime, tuple(sorted(set(sms))) or default_sms(candidate, precision))


def default_sms(candidate: Backend, precision: str) -> tuple[int, ...]:
    """Every GPU generation that the backend, the kernels and the precision support."""
    return tuple(sm for sm in candidate.sms if sm in SMS and (precision != "fp8" or supports_fp8(sm)))


def _check_sm(candidate: Backend, sm: int, precision: str) -> None:
    choices = ", ".join(map(str, default_sms(candidate, precision)))
    if sm not in candidate.sms and sm in SMS:
        raise UsageError(
            f"{candidate.title} builds no engines for SM {sm}",
            hint=f"use --runtime tensorrt on a machine with that GPU; --sm takes {choices}",
        )
    if sm not in candidate.sms:
        raise UsageError(f"{candidate.title} does not know SM {sm}", hint=f"--sm takes {choices}")
    _check_kernels(sm, precision, f"--sm takes {choices}")


def _check_kernels(sm: int, precision: str, hint: str = "--runtime onnx builds without engines") -> None:
    if sm not in SMS:
        raise UsageError(f"there are no kernels for SM {sm}, only for " + ", ".join(map(str, SMS)), hint=hint)
    if precision == "fp8" and not supports_fp8(sm):
        raise UsageError(f"SM {sm} has no FP8 tensor cores", hint=f"use --precision fp16 or bf16; {hint}")


def check_can_link() -> None:
    """Raise CompileError if no plugin library is installed and a tool for building one is missing."""
    if is_shipped():
        return
    if find_spec("triton") is None:
        raise CompileError(
            "compiling the ops' kernels needs Triton", hint="pip install 'nemo-export[kernels]'"
        )
    if shutil.which("g++") is None:
        raise CompileError("linking the plugin library needs g++", hint="install g++")
