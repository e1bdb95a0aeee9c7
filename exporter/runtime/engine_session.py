"""A session that runs a bundle's TensorRT engine step by step on a GPU, with the interface of `session.Session`.

**Not yet run on a GPU**: it is written for the Python API of TensorRT 11 and TensorRT-RTX 1.7, and its tests use a fake
TensorRT and a fake CUDA driver. `make engine-check` runs it on a real GPU and reports.

Legend: T tokens in this step, B sequences in this step, S state slots, K pages in the pool, M pages of one
sequence, R rows that need logits, V vocabulary.
"""

import mmap
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import ml_dtypes  # noqa: F401 - teaches NumPy the names bfloat16 and float8_e4m3fn
import numpy as np
from numpy.typing import NDArray

from nemotrt.exporter.errors import BundleError, UsageError
from nemotrt.exporter.runtime import manifest as manifests
from nemotrt.exporter.runtime.backends import BACKENDS, Backend, backend, because, load_module, new_log
from nemotrt.exporter.runtime.cuda import CapturedGraph, CudaError, Device, Gpu, Memory
from nemotrt.exporter.runtime.files import sha256
from nemotrt.exporter.runtime.manifest import Manifest, Profile
from nemotrt.exporter.runtime.session import AnySession
from nemotrt.exporter.runtime.step import SIZED_BY, StepInputs, StepSizes, batch_sizes, is_decode, padded
from nemotrt.plugins.contract import LOGITS

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
    log = new_log(trt)
    runtime = trt.Runtime(log)
    for library in libraries:
        if runtime.get_plugin_registry().load_library(str(library)) is None:
            raise BundleError(f"{used.title} does not load {library}: {because(log)}")
    # The file is mapped, not copied.
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content:
        engine = runtime.deserialize_cuda_engine(content)
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


@dataclass
class _Context:
    """An execution context of one profile, and for decode steps the CUDA graph captured in its second run."""

    handle: Any
    """trt.IExecutionContext."""
    has_run: bool = False
    graph: CapturedGraph | None = None


class EngineSession(AnySession):
    """An engine, and its pools in the GPU's memory, which start at zero.

    A step uses the first profile that it fits. A decode step (no sequence has more than one token) is padded to one of
    a few batch sizes. For each size, the first step runs normally, the second is captured as a CUDA graph, and later
    ones launch that graph. All contexts share their scratch memory, since steps never overlap.
    """

    def __init__(
        self, bundle: Path, *, num_slots: int, num_pages: int, device: int = 0, capture: bool = True
    ) -> None:
        """Load the bundle's engine with `num_slots` slots and `num_pages` pages, scratch included.

        Without `capture`, decode steps are launched kernel by kernel, for comparison. Raises BundleError if the bundle
        is damaged or its engine is for another GPU or TensorRT, UsageError if the pools exceed the engine's limits or
        the GPU's memory.
        """
        manifest = manifests.verify(bundle, deep=False)
        profile = engine_profile(bundle, manifest)
        try:
            self._device = Device(device)
        except CudaError as error:
            raise UsageError(f"{bundle}'s engine needs a GPU: {error}") from error
        gpu = self._device.gpu
        self._opened = open_engine(bundle, manifest, profile, gpu)
        self.runs_as = f"{self._opened.backend.title} {profile.runtime_version} on {gpu.name} (SM {gpu.sm})"
        self.vocab_size = manifest.model.vocab_size
        self.num_slots, self.num_pages = num_slots, num_pages
        self.pools = {pool.name: pool for pool in manifest.graph.pools}
        self._dtypes = {edge.name: edge.dtype for edge in manifest.graph.inputs}
        self._inputs = [edge.name for edge in manifest.graph.inputs if edge.name not in self.pools]
        self._profiles = range(self._opened.engine.num_optimization_profiles)
        self._limits = [self._bounds(index) for index in self._profiles]
        self._check_places()
        self._check_rows()
        try:
            self._allocate()
        except CudaError as error:
            raise UsageError(
                f"{gpu.name} has no room for {num_slots} slots, {num_pages} pages and the engine: {error}",
                hint="give fewer slots or pages",
            ) from error
        self._whole = {index: self._new_context(index) for index in self._profiles}
        self._decode: dict[int, _Context] = {}
        self._batch_sizes = batch_sizes(self._limits[0][1].B)
        self._capture = capture

    def step(self, inputs: StepInputs) -> NDArray[np.float32]:
        """The logits [R, V] of one step; the pools are updated.

        Raises UsageError with the input that breaks the contract or the size that exceeds the engine; the pools are
        then unchanged. Raises BundleError if TensorRT or a kernel fails; the session must not be used again.
        """
        self._check(inputs)
        logits_RV = np.empty((len(inputs.logits_row), self.vocab_size), dtype=np.float32)
        # An engine takes at least one of each: a step without logits computes one row, which is not read.
        sizes = StepSizes.of(inputs).at_least(self._limits[0][0])
        index = self._choose(sizes)
        try:
            self._device.make_current()
            if index == 0 and is_decode(inputs):
                self._run_decode(inputs, sizes)
            else:
                inputs = padded(inputs, sizes)
                self._write(inputs)
                self._set_shapes(self._whole[index], inputs)
                self._enqueue(self._whole[index])
            self._device.read(self._buffers[LOGITS], logits_RV)
        except CudaError as error:
            raise BundleError(f"a step failed on the GPU: {error}; {because(self._opened.log)}") from error
        return logits_RV

    def _read_pool(self, name: str) -> NDArray[Any]:
        values = np.empty(self._pool_shape(name), dtype=self.pools[name].dtype.numpy)
        self._device.make_current()
        self._device.read(self._buffers[name], values)
        return values

    def _write_pool(self, name: str, values: NDArray[Any]) -> None:
        converted = np.ascontiguousarray(values.astype(self.pools[name].dtype.numpy))
        self._device.make_current()
        self._device.write(self._buffers[name], converted)
        self._device.synchronize()

    def _shapes(self, name: str, index: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """The min and the max shape of an input in a profile."""
        low, _, high = self._opened.engine.get_tensor_profile_shape(name, index)
        return tuple(low), tuple(high)

    def _bounds(self, index: int) -> tuple[StepSizes, StepSizes]:
        """The min and the max sizes of a step in a profile; an axis that no input has is unbounded."""
        lows, highs = {}, {}
        for axis, (name, position) in SIZED_BY.items():
            lows[axis], highs[axis] = 0, int(np.iinfo(np.int32).max)
            if name in self._inputs:
                low, high = self._shapes(name, index)
                lows[axis], highs[axis] = low[position], high[position]
        return StepSizes(**lows), StepSizes(**highs)

    def _choose(self, sizes: StepSizes) -> int:
        """The first profile that a step fits; raises UsageError if there is none."""
        for index, limits in enumerate(self._limits):
            if sizes.fits(*limits):
                return index
        largest = self._limits[-1][1]
        raise UsageError(
            f"a step of {sizes.T} tokens, {sizes.B} sequences, {sizes.M} pages each and {sizes.R} rows of logits"
            f" exceeds the engine's {largest.T}, {largest.B}, {largest.M} and {largest.R}",
            hint="build with a larger --max-tokens, --max-sequences or --max-context",
        )

    def _check_places(self) -> None:
        """Raise BundleError if TensorRT expects an input in host memory, because it wrongly determines a shape."""
        device, engine = self._opened.trt.TensorLocation.DEVICE, self._opened.engine
        for name in (*self._inputs, *self.pools):
            if engine.get_tensor_location(name) != device:
                raise BundleError(f"the engine takes {name} from host memory: a shape depends on its values")

    def _check_rows(self) -> None:
        for name in self.pools:
            (low, *_), (high, *_) = self._shapes(name, 0)
            rows = self._pool_shape(name)[0]
            if not low <= rows <= high:
                raise UsageError(
                    f"{name} would have {rows} rows, the engine takes {low} to {high}",
                    hint="build with a larger --max-sequences or --max-context",
                )

    def _allocate(self) -> None:
        """Allocate the inputs and logits at their maximum sizes, the pools, and the contexts' shared scratch memory."""
        self._buffers: dict[str, Memory] = {}
        for name in self._inputs:
            count = max(int(np.prod(self._shapes(name, index)[1])) for index in self._profiles)
            self._buffers[name] = self._device.allocate(count * np.dtype(self._dtypes[name]).itemsize)
        rows = max(high.R for _, high in self._limits)
        self._buffers[LOGITS] = self._device.allocate(rows * self.vocab_size * 4)
        for name, pool in self.pools.items():
            self._buffers[name] = self._device.allocate(self._pool_shape(name)[0] * pool.row_bytes)
            self._device.clear(self._buffers[name])
        scratch_bytes = map(self._opened.engine.get_device_memory_size_for_profile_v2, self._profiles)
        self._scratch = self._device.allocate(max(scratch_bytes))

    def _new_context(self, index: int) -> _Context:
        """A context of a profile with its memory bound; a pool's input and output share one buffer."""
        handle = create_context(self._opened)
        handle.set_device_memory(self._scratch.address, self._scratch.num_bytes)
        bound = [handle.set_optimization_profile_async(index, self._device.stream)]
        self._device.synchronize()
        for name, memory in self._buffers.items():
            bound.append(handle.set_tensor_address(name, memory.address))
            if name in self.pools:
                bound.append(handle.set_tensor_address(self.pools[name].output, memory.address))
                bound.append(handle.set_input_shape(name, self._pool_shape(name)))
        if not all(bound):
            raise BundleError(f"the engine does not match the manifest: {because(self._opened.log)}")
        return _Context(handle)

    def _run_decode(self, inputs: StepInputs, sizes: StepSizes) -> None:
        """Run a decode step, padded to a batch size with its own context, which therefore sees one shape only."""
        size = next(size for size in self._batch_sizes if size >= max(sizes.T, sizes.B, sizes.R))
        pages = self._limits[0][1].M if "page_table" in self._inputs else sizes.M
        context = self._decode.get(size) or self._decode.setdefault(size, self._new_context(0))
        inputs = padded(inputs, StepSizes(T=size, B=size, M=pages, R=size))
        self._write(inputs)
        if not context.has_run:
            self._set_shapes(context, inputs)
        if not (context.has_run and self._capture):
            self._enqueue(context)
            context.has_run = True
            return
        if context.graph is None:
            # TensorRT has prepared everything for the shape in the previous run.
            context.graph = self._device.capture(lambda: self._enqueue(context))
        context.graph.launch()

    def _write(self, inputs: StepInputs) -> None:
        for name in self._inputs:
            self._device.write(self._buffers[name], np.ascontiguousarray(getattr(inputs, name)))

    def _set_shapes(self, context: _Context, inputs: StepInputs) -> None:
        for name in self._inputs:
            if not context.handle.set_input_shape(name, getattr(inputs, name).shape):
                raise BundleError(f"the engine refuses {name}'s shape: {because(self._opened.log)}")
        try:
            missing = context.handle.infer_shapes()
        except RuntimeError as error:
            raise BundleError(f"the engine refuses the step: {because(self._opened.log)}") from error
        if missing:
            raise BundleError(f"the engine has an input {missing[0]} that is not in the manifest")

    def _enqueue(self, context: _Context) -> None:
        if not context.handle.execute_async_v3(self._device.stream):
            raise BundleError(f"TensorRT failed in a step: {because(self._opened.log)}")
