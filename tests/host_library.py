"""A plugin library whose kernels are names, and a CUDA driver that calls a test back at each launch.

The library is the real host and the real tables of every variant; only the cubins are not code. So all that the
host does, up to and with the arguments of each launch, is tested on a machine with no GPU and no compiled kernels.
"""

from __future__ import annotations

import ctypes
import functools
import hashlib
import os
import shutil
import subprocess
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from importlib import import_module
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from nemotrt.plugins.kernel_index import Kernel, KernelIndex
from nemotrt.plugins.library import PluginLibrary, TensorShape
from nemotrt.plugins.link import Toolchain, link
from nemotrt.plugins.spec import OpSpec, ops
from nemotrt.plugins.variant import SMS

pytest.importorskip("triton", reason="the list of kernels needs Triton: install nemo-export[kernels]")
if not shutil.which("g++"):
    pytest.skip("the plugin host needs a C++ compiler: install g++", allow_module_level=True)

ROOT = Path(__file__).parent.parent
# Linking is skipped where nothing changed since the last run; workers of pytest-xdist keep apart.
FOLDER = ROOT / "build" / "tests" / f"host-{os.environ.get('PYTEST_XDIST_WORKER', 'main')}"

SPECS = {spec.torch_name: spec for spec in ops()}


def kernels_of(spec: OpSpec) -> ModuleType:
    """The op's kernels.py."""
    return import_module(f"{spec.package}.kernels")


def fake_shared(variant: Any) -> int:
    """Bytes of shared memory that a fake kernel asks for: more than 48 KB for some, as real ones do."""
    return 1024 * len(variant.name)


@functools.cache
def index() -> KernelIndex:
    """Every variant for every SM, each with its own name for a cubin."""
    folder = FOLDER / "kernels"
    kernels = []
    for sm in SMS:
        for name, spec in SPECS.items():
            for variant in sorted(kernels_of(spec).variants(sm), key=lambda variant: str(variant.name)):
                file = f"sm{sm}/{name}/{variant.name}.cubin"
                cubin = variant.name.encode() + b"\0"
                (folder / file).parent.mkdir(parents=True, exist_ok=True)
                (folder / file).write_bytes(cubin)
                kernels.append(fake_kernel(name, sm, variant, file, cubin))
    return KernelIndex(folder, "none: these kernels are names", tuple(kernels))


def fake_kernel(op: str, sm: int, variant: Any, file: str, cubin: bytes) -> Kernel:
    """The index's entry of a variant."""
    return Kernel(
        op=op,
        sm=sm,
        variant=variant,
        file=file,
        sha256=hashlib.sha256(cubin).hexdigest(),
        num_bytes=len(cubin),
        entry=variant.kernel,
        target=f"sm_{sm}",
        hidden_pointers=2,
        shared=fake_shared(variant),
        registers=0,
        stack=0,
        spill_stores=0,
        spill_loads=0,
    )


@functools.cache
def library() -> PluginLibrary:
    """The library of all fake kernels, its driver the fake one."""
    loaded = PluginLibrary(link(index(), FOLDER / "release", Toolchain()))
    loaded.entry("driver")(str(driver().path).encode())
    return loaded


class Launched(ctypes.Structure):
    """What a launch was given; see fake_driver.cpp."""

    _fields_ = (
        ("variant", ctypes.c_char_p),
        ("entry", ctypes.c_char_p),
        ("grid", ctypes.c_uint * 3),
        ("block", ctypes.c_uint * 3),
        ("shared_bytes", ctypes.c_uint),
        ("allowed_shared_bytes", ctypes.c_uint),
        ("stream", ctypes.c_void_p),
        ("parameters", ctypes.POINTER(ctypes.c_void_p)),
    )

    def values(self, kinds: Sequence[str]) -> list[int | float]:
        """The parameters, of Triton's types: an address for a pointer."""
        types = {"i32": ctypes.c_int32, "i64": ctypes.c_int64, "fp32": ctypes.c_float}
        return [
            types.get(kind, ctypes.c_uint64).from_address(self.parameters[i]).value
            for i, kind in enumerate(kinds)
        ]


_CALLBACK = ctypes.CFUNCTYPE(None, ctypes.POINTER(Launched))


class FakeDriver:
    """The fake driver, loaded under its own path."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._library = ctypes.CDLL(str(path))

    @contextmanager
    def running(self, on_launch: Callable[[Launched], None], sm: int = 90) -> Iterator[FakeDriver]:
        """Within it, launches reach the callback, on a GPU of that SM; what it raises is raised at the end."""
        raised: list[BaseException] = []

        def called(launched: Any) -> None:
            try:
                on_launch(launched.contents)
            except Exception as error:  # noqa: BLE001 - it cannot cross the library's frames
                raised.append(error)

        callback = _CALLBACK(called)
        self._library.fake_reset(sm, callback)
        try:
            yield self
        finally:
            self._library.fake_reset(sm, None)
        if raised:
            raise raised[0]

    def fail(self, call: str) -> None:
        """Makes a driver function return CUDA_ERROR_OUT_OF_MEMORY from now on."""
        self._library.fake_fail(call.encode())

    def calls(self, call: str) -> int:
        """How often a function was called since `running` began."""
        return int(self._library.fake_calls(call.encode()))


@functools.cache
def driver() -> FakeDriver:
    """The fake driver, compiled."""
    source = ROOT / "tests" / "unit" / "fake_driver.cpp"
    path = FOLDER / f"driver-{hashlib.sha256(source.read_bytes()).hexdigest()[:16]}.so"
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        part = path.with_suffix(".part")
        warnings = ("-Wall", "-Wextra", "-Werror")
        subprocess.run(["g++", "-std=c++17", "-fPIC", "-shared", *warnings, source, "-o", part], check=True)
        part.replace(path)
    return FakeDriver(path)


def shapes_of(spec: OpSpec, sizes: Mapping[str, int], dtypes: Mapping[str, str]) -> list[TensorShape]:
    """The inputs of an op, from its axes' sizes and its dtype variables."""

    def size(axis: str | int) -> int:
        if isinstance(axis, int):
            return axis
        if axis in sizes:
            return sizes[axis]
        name, sign, number = axis.partition("+") if "+" in axis else axis.partition("-")
        return sizes[name] + int(sign + number)

    return [
        (dtypes.get(tensor.dtype, tensor.dtype), tuple(size(axis) for axis in tensor.axes))
        for tensor in spec.inputs
    ]
