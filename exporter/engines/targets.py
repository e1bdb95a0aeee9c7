"""What a build's engines are to run on: the runtime and the GPU generations, settled before any long work."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib.util import find_spec

from nemotrt.exporter.errors import CompileError, UsageError
from nemotrt.exporter.runtime.backends import BACKENDS, Backend, backend, missing
from nemotrt.exporter.runtime.cuda import CudaError, Gpu, find_gpu
from nemotrt.plugins.shipped import is_shipped
from nemotrt.plugins.variant import SMS, supports_fp8

ONNX = "onnx"
AUTO = "auto"


@dataclass(frozen=True)
class Target:
    """A runtime of config.RUNTIMES but auto, the SMs that its engine is for, and why it was taken, for a person."""

    runtime: str
    sms: tuple[int, ...] = ()
    why: str = ""
    may_fall_back: bool = False
    """Whether a build may go on without an engine, out loud: nobody asked for this one by name."""

    @property
    def gpus(self) -> str:
        """The GPU generations in words."""
        return "SM " + ", ".join(map(str, self.sms))

    @property
    def title(self) -> str:
        """The runtime, and the GPU generations where it has some."""
        return f"{self.runtime} for {self.gpus}" if self.sms else self.runtime


def settle(
    runtime: str,
    sms: Sequence[int],
    precision: str,
    *,
    gpu: Callable[[], Gpu] = find_gpu,
) -> Target:
    """The target of a build; raises UsageError or CompileError on one that cannot be, with what to do instead.

    With `auto` the first backend that this machine can build for is taken, and Target.why says what stood in
    the way of the others.
    """
    if runtime == ONNX:
        if sms:
            raise UsageError("--sm has no effect with --runtime onnx", hint="leave one of them out")
        return Target(ONNX)
    if runtime != AUTO:
        return _target(backend(runtime), sms, precision, gpu)
    refusals = []
    for candidate in BACKENDS:
        if sms and candidate.needs_gpu:
            continue  # SMs are named for the one that builds for GPUs elsewhere
        try:
            target = _target(candidate, sms, precision, gpu)
        except CompileError as error:
            if sms:
                raise
            refusals.append(str(error))
            continue
        return Target(target.runtime, target.sms, "; ".join(refusals), may_fall_back=not sms)
    return Target(ONNX, (), "; ".join(refusals))


def _target(candidate: Backend, sms: Sequence[int], precision: str, gpu: Callable[[], Gpu]) -> Target:
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
            found = gpu()
        except CudaError as error:
            raise CompileError(
                f"{candidate.title} builds engines on a GPU only: {error}",
                hint="build on the GPU's machine; --runtime tensorrt-rtx builds engines for RTX GPUs anywhere",
            ) from error
        try:
            _check_kernels(found.sm, precision)
        except UsageError as error:  # nobody chose this GPU
            raise CompileError(f"{found.name}: {error}", hint=error.hint) from error
        return Target(candidate.runtime, (found.sm,))
    check_can_link()
    return Target(candidate.runtime, tuple(sorted(set(sms))) or default_sms(candidate, precision))


def default_sms(candidate: Backend, precision: str) -> tuple[int, ...]:
    """Every GPU generation that the backend builds for, the kernels exist for, and the precision runs on."""
    return tuple(sm for sm in candidate.sms if sm in SMS and (precision != "fp8" or supports_fp8(sm)))


def _check_sm(candidate: Backend, sm: int, precision: str) -> None:
    choices = ", ".join(map(str, default_sms(candidate, precision)))
    if sm not in candidate.sms and sm in SMS:
        raise UsageError(
            f"{candidate.title} builds no engines for SM {sm}",
            hint=f"use --runtime tensorrt on a machine with that GPU; --sm takes {choices}",
        )
    if sm not in candidate.sms:
        raise UsageError(f"{candidate.title} knows no SM {sm}", hint=f"--sm takes {choices}")
    _check_kernels(sm, precision, f"--sm takes {choices}")


def _check_kernels(sm: int, precision: str, hint: str = "--runtime onnx builds without engines") -> None:
    if sm not in SMS:
        raise UsageError(f"there are no kernels for SM {sm}, only for " + ", ".join(map(str, SMS)), hint=hint)
    if precision == "fp8" and not supports_fp8(sm):
        raise UsageError(f"SM {sm} has no FP8 tensor cores", hint=f"use --precision fp16 or bf16; {hint}")


def check_can_link() -> None:
    """Raise CompileError that says what is missing for making a plugin library, where none is installed."""
    if is_shipped():
        return
    if find_spec("triton") is None:
        raise CompileError(
            "compiling the ops' kernels needs Triton", hint="pip install 'nemo-export[kernels]'"
        )
    if shutil.which("g++") is None:
        raise CompileError("linking the plugin library needs g++", hint="install g++")
