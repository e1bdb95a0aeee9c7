"""A GPU and a TensorRT that are not there: CUDA's driver on host memory, and engines that ONNX Runtime runs.

What they refuse is what the real ones document: a captured call that has not run once in its shape, a tensor
without an address, a shape outside the profile, a state whose input and output are in two places.
"""

from __future__ import annotations

import ctypes
import dataclasses
import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import onnxruntime as ort

from nemotrt.exporter.config import BuildConfig
from nemotrt.exporter.engines.shape_profiles import engine_profiles, max_rows
from nemotrt.exporter.runtime import manifest as manifests

Shape = tuple[int, ...]

ENGINE, LIBRARY, VERSION = "engines/tensorrt-rtx.engine", "plugins/libnemo_plugins.so", "1.7.1"
"""Of the bundle's engine that is none."""

NAMES = {"tensor(float)": np.float32, "tensor(int64)": np.int64, "tensor(int32)": np.int32}

ACTIONS = {
    "cuGetErrorString": "_get_error_string",
    "cuDeviceGetCount": "_device_get_count",
    "cuDeviceGetName": "_device_get_name",
    "cuDeviceGetAttribute": "_device_get_attribute",
    "cuDriverGetVersion": "_driver_get_version",
    "cuDevicePrimaryCtxRetain": "_primary_ctx_retain",
    "cuCtxSetCurrent": "_ctx_set_current",
    "cuStreamCreate": "_stream_create",
    "cuMemAlloc_v2": "_mem_alloc",
    "cuMemFree_v2": "_mem_free",
    "cuMemsetD8Async": "_memset_d8async",
    "cuMemcpyHtoDAsync_v2": "_memcpy_hto_dasync",
    "cuMemcpyDtoHAsync_v2": "_memcpy_dto_hasync",
    "cuStreamBeginCapture_v2": "_stream_begin_capture",
    "cuStreamEndCapture": "_stream_end_capture",
    "cuGraphInstantiateWithFlags": "_graph_instantiate_with_flags",
    "cuGraphLaunch": "_graph_launch",
}
"""Functions of the driver that do something here; all others only succeed."""


IN_A_CONTEXT = ("cuMem", "cuStream", "cuGraph")
"""How functions begin that need a context in the calling thread."""


@dataclass
class FakeCuda:
    """Functions of libcuda by name, as ctypes would call them."""

    memory: dict[int, np.ndarray] = field(default_factory=dict)
    recording: list[Callable[[], None]] | None = None
    graphs: dict[int, list[Callable[[], None]]] = field(default_factory=dict)
    launched: int = 0
    failing: str = ""
    sm: tuple[int, int] = (8, 9)
    current: threading.local = field(default_factory=threading.local)

    def __getattr__(self, name: str) -> Callable[..., int]:
        if not name.startswith("cu"):
            raise AttributeError(name)

        def call(*arguments: Any) -> int:
            if name == self.failing:
                return 2
            if name.startswith(IN_A_CONTEXT) and not hasattr(self.current, "context"):
                return 201
            if name in ACTIONS:
                getattr(self, ACTIONS[name])(*arguments)
            return 0

        return call

    def enqueue(self, work: Callable[[], None]) -> None:
        if self.recording is None:
            work()
        else:
            self.recording.append(work)

    def _get_error_string(self, code: int, text: Any) -> None:
        text._obj.value = b"out of memory"

    def _device_get_count(self, count: Any) -> None:
        count._obj.value = 1

    def _device_get_name(self, name: Any, length: int, device: int) -> None:
        name.value = b"Fake RTX"

    def _device_get_attribute(self, value: Any, attribute: int, device: int) -> None:
        value._obj.value = self.sm[attribute - 75]

    def _driver_get_version(self, version: Any) -> None:
        version._obj.value = 13010

    def _primary_ctx_retain(self, context: Any, device: int) -> None:
        context._obj.value = 55

    def _ctx_set_current(self, context: Any) -> None:
        assert context.value == 55
        self.current.context = context.value

    def _stream_create(self, stream: Any, flags: int) -> None:
        stream._obj.value = 77

    def _mem_alloc(self, address: Any, size: Any) -> None:
        held = np.full(size.value, 0xFF, dtype=np.uint8)
        self.memory[held.ctypes.data] = held
        address._obj.value = held.ctypes.data

    def _mem_free(self, address: Any) -> None:
        del self.memory[address.value]

    def _memset_d8async(self, address: Any, value: Any, size: Any, stream: Any) -> None:
        ctypes.memset(address.value, value.value, size.value)

    def _memcpy_hto_dasync(self, address: Any, source: Any, size: Any, stream: Any) -> None:
        assert self.recording is None
        ctypes.memmove(address.value, source, size.value)

    def _memcpy_dto_hasync(self, target: Any, address: Any, size: Any, stream: Any) -> None:
        ctypes.memmove(target, address.value, size.value)

    def _stream_begin_capture(self, stream: Any, mode: int) -> None:
        self.recording = []

    def _stream_end_capture(self, stream: Any, graph: Any) -> None:
        assert self.recording is not None
        graph._obj.value = len(self.graphs) + 1
        self.graphs[len(self.graphs) + 1] = self.recording
        self.recording = None

    def _graph_instantiate_with_flags(self, executable: Any, graph: Any, flags: Any) -> None:
        executable._obj.value = graph.value

    def _graph_launch(self, executable: Any, stream: Any) -> None:
        self.launched += 1
        for work in self.graphs[executable.value]:
            work()


class FakeEngine:
    """An engine of some profiles, each an input's name → its least, best and most shape."""

    def __init__(
        self,
        cuda: FakeCuda,
        session: ort.InferenceSession,
        profiles: list[dict[str, tuple[Shape, Shape, Shape]]],
        pools: dict[str, str],
    ) -> None:
        self.cuda, self.session, self.profiles, self.pools = cuda, session, profiles, pools
        self.num_optimization_profiles = len(profiles)
        self.contexts: list[FakeContext] = []
        self.failing_shapes = False
        self.on_host: set[str] = set()

    def get_tensor_location(self, name: str) -> int:
        return 1 if name in self.on_host else 0

    def get_tensor_profile_shape(self, name: str, index: int) -> list[Shape]:
        return list(self.profiles[index][name])

    def get_device_memory_size_for_profile_v2(self, index: int) -> int:
        return 100 + index

    def create_runtime_config(self) -> Any:
        return SimpleNamespace(set_execution_context_allocation_strategy=lambda strategy: None)

    def create_execution_context(self, config: Any) -> FakeContext:
        self.contexts.append(FakeContext(self))
        return self.contexts[-1]


class FakeContext:
    """What is asked of an execution context."""

    def __init__(self, engine: FakeEngine) -> None:
        self.engine = engine
        self.addresses: dict[str, int] = {}
        self.shapes: dict[str, Shape] = {}
        self.profile = -1
        self.scratch = (0, 0)
        self.is_settled = False

    def set_device_memory(self, address: int, size: int) -> None:
        assert address in self.engine.cuda.memory
        self.scratch = (address, size)

    def set_optimization_profile_async(self, index: int, stream: int) -> bool:
        self.profile = index
        return True

    def set_tensor_address(self, name: str, address: int) -> bool:
        known = {
            value.name for value in (*self.engine.session.get_inputs(), *self.engine.session.get_outputs())
        }
        self.addresses[name] = address
        return name in known

    def set_input_shape(self, name: str, shape: Shape) -> bool:
        least, _, most = self.engine.profiles[self.profile][name]
        if not all(low <= size <= high for low, size, high in zip(least, shape, most, strict=True)):
            return False
        self.is_settled = self.is_settled and self.shapes.get(name) == tuple(shape)
        self.shapes[name] = tuple(shape)
        return True

    def infer_shapes(self) -> list[str]:
        if self.engine.failing_shapes:
            raise RuntimeError("shape inference failed")
        return [value.name for value in self.engine.session.get_inputs() if value.name not in self.shapes]

    def get_tensor_shape(self, name: str) -> Shape:
        names = [value.name for value in self.engine.session.get_outputs()]
        return self._results(self.shapes)[names.index(name)].shape

    def execute_async_v3(self, stream: int) -> bool:
        names = {
            value.name for value in (*self.engine.session.get_inputs(), *self.engine.session.get_outputs())
        }
        if stream != 77 or set(self.addresses) != names:
            return False
        if self.scratch[1] < self.engine.get_device_memory_size_for_profile_v2(self.profile):
            return False
        if any(self.addresses[one] != self.addresses[other] for one, other in self.engine.pools.items()):
            return False
        if self.engine.cuda.recording is not None and not self.is_settled:
            return False
        self.is_settled = True
        self.engine.cuda.enqueue(lambda shapes=dict(self.shapes): self._run(shapes))
        return True

    def _at(self, name: str, shape: Shape, dtype: Any) -> np.ndarray:
        address, num_bytes = self.addresses[name], int(np.prod(shape)) * np.dtype(dtype).itemsize
        assert len(self.engine.cuda.memory[address]) >= num_bytes, name
        return np.frombuffer((ctypes.c_char * num_bytes).from_address(address), dtype=dtype).reshape(shape)

    def _results(self, shapes: dict[str, Shape]) -> list[np.ndarray]:
        session = self.engine.session
        feeds = {
            value.name: self._at(value.name, shapes[value.name], NAMES[value.type]).copy()
            for value in session.get_inputs()
        }
        return session.run(None, feeds)

    def _run(self, shapes: dict[str, Shape]) -> None:
        session = self.engine.session
        for value, result in zip(session.get_outputs(), self._results(shapes), strict=True):
            self._at(value.name, result.shape, result.dtype)[...] = result


class Severity(int):
    """trt.ILogger.Severity, ordered."""


class Logger:
    """trt.ILogger."""

    Severity = SimpleNamespace(ERROR=Severity(1))


def fake_module(version: str, engine: FakeEngine | None, loads: bool = True) -> Any:
    """A module that deserialises to that engine, whatever the file holds."""
    loaded: list[str] = []

    def load_library(path: str) -> object | None:
        loaded.append(path)
        return object() if loads else None

    class Runtime:
        def __init__(self, log: Any) -> None:
            self.log = log

        def get_plugin_registry(self) -> Any:
            return SimpleNamespace(load_library=load_library)

        def deserialize_cuda_engine(self, content: Any) -> Any:
            if engine is None:
                self.log.log(Severity(1), "Serialization\n  assertion failed")
            return engine

    return SimpleNamespace(
        __version__=version,
        ILogger=Logger,
        Runtime=Runtime,
        TensorLocation=SimpleNamespace(DEVICE=0, HOST=1),
        ExecutionContextAllocationStrategy=SimpleNamespace(USER_MANAGED=2),
        DynamicShapesKernelSpecializationStrategy=SimpleNamespace(EAGER=1),
        loaded=loaded,
    )


def add_engine(bundle: Path, config: BuildConfig) -> None:
    """Make the bundle say that it has an engine for SM 89 and 120, with files that stand for it and its library."""
    for name in (ENGINE, LIBRARY):
        (bundle / name).parent.mkdir()
        (bundle / name).write_bytes(b"stand-in")
    manifest = manifests.read(bundle)
    roles = {file.path: file.role for file in manifest.files} | {
        ENGINE: manifests.Role.ENGINE,
        LIBRARY: manifests.Role.PLUGINS,
    }
    profile = dataclasses.replace(
        manifest.profiles[0],
        runtime="tensorrt-rtx",
        path=ENGINE,
        runtime_version=VERSION,
        sms=(89, 120),
        max_rows=max_rows(config),
    )
    changed = dataclasses.replace(
        manifest,
        files=manifests.describe_files(bundle, roles),
        profiles=(*manifest.profiles, profile),
        plugins=(manifests.Plugin("nemo_plugins", "0.1.0", "nemo", LIBRARY, "b0"),),
    )
    manifests.write(bundle, changed)


def engine_of(bundle: Path, config: BuildConfig, cuda: FakeCuda) -> FakeEngine:
    """The bundle's graph as an engine with the profiles that a build of this configuration has."""
    manifest = manifests.read(bundle)
    profiles = [
        {edge.name: profile.shapes(edge.axes) for edge in manifest.graph.inputs}
        for profile in engine_profiles(config)
    ]
    session = ort.InferenceSession(str(bundle / "model.onnx"))
    return FakeEngine(cuda, session, profiles, {pool.name: pool.output for pool in manifest.graph.pools})
