"""A TensorRT engine with the pools it updates: what `session.Session` is for ONNX Runtime, on a GPU.

**Not executed**: written against the API of TensorRT 11 and TensorRT-RTX 1.7 as their Python modules describe it.
Tests run it on a stand-in for TensorRT and CUDA; `make engine-check` runs it on a real GPU and reports.

Legend: T tokens in this step, B sequences in this step, S state slots, K pages in the pool, M pages of one
sequence, R rows that want logits, V vocabulary.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ml_dtypes  # noqa: F401 - teaches NumPy the names bfloat16 and float8_e4m3fn
import numpy as np
from numpy.typing import NDArray

from nemotrt.exporter.errors import BundleError, UsageError
from nemotrt.exporter.runtime import manifest as manifests
from nemotrt.exporter.runtime.cuda import CapturedGraph, CudaError, Device, Memory
from nemotrt.exporter.runtime.engine_file import because, create_context, engine_profile, open_engine
from nemotrt.exporter.runtime.padding import StepSizes, batch_sizes, is_decode, padded
from nemotrt.exporter.runtime.step import StepInputs, check_step
from nemotrt.plugins.contract import LOGITS

SIZED_BY = {"T": ("input_ids", 0), "B": ("context_len", 0), "M": ("page_table", 1), "R": ("logits_row", 0)}
"""A free axis → an input that has it, and where."""


@dataclass
class _Context:
    """An execution context of one profile; that of a decode step is captured at its second run."""

    handle: Any
    """trt.IExecutionContext."""
    has_run: bool = False
    graph: CapturedGraph | None = None


class EngineSession:
    """An engine that runs step by step on pools in the GPU's memory, which the session owns; zero at first.

    A step takes the first profile that holds it. A step in which no sequence has more than one token is padded
    to one of a few batch sizes; for each the first step runs as it is, the second is captured, and all later
    ones launch the captured graph. Contexts share their scratch memory: steps never overlap.
    """

    def __init__(
        self, bundle: Path, *, num_slots: int, num_pages: int, device: int = 0, capture: bool = True
    ) -> None:
        """Load the bundle's engine with `num_slots` slots and `num_pages` pages, scratch included.

        Without `capture` the same steps run, launched kernel by kernel: for comparison.
        Raises BundleError when the bundle is not whole, or its engine is for another GPU or TensorRT; UsageError
        when the pools are larger than the engine was built for, or the GPU's memory.
        """
        manifest = manifests.verify(bundle, deep=False)
        profile = engine_profile(bundle, manifest)
        try:
            self._device = Device(device)
        except CudaError as error:
            raise UsageError(f"{bundle} runs on a GPU only: {error}") from error
        gpu = self._device.gpu
        self._opened = open_engine(bundle, manifest, profile, gpu)
        self.runs_as = f"{self._opened.backend.title} {profile.runtime_version} on {gpu.name} (SM {gpu.sm})"
        self.vocab_size = manifest.model.vocab_size
        self.num_slots, self.num_pages = num_slots, num_pages
        self.pools = {pool.name: pool for pool in manifest.graph.pools}
        self._dtypes = {edge.name: edge.dtype for edge in manifest.graph.inputs}
        self._inputs = [edge.name for edge in manifest.graph.inputs if edge.name not in self.pools]
        self._limits = [self._bounds(index) for index in range(self._num_profiles)]
        self._check_places()
        self._check_rows()
        try:
            self._allocate()
        except CudaError as error:
            raise UsageError(
                f"{gpu.name} has no room for {num_slots} slots, {num_pages} pages and the engine: {error}",
                hint="give fewer slots or pages",
            ) from error
        self._whole = {index: self._new_context(index) for index in range(self._num_profiles)}
        self._decode: dict[int, _Context] = {}
        self._batch_sizes = batch_sizes(self._limits[0][1].B)
        self._capture = capture

    @property
    def pool_names(self) -> tuple[str, ...]:
        """The pools in the graph's order."""
        return tuple(self.pools)

    @property
    def page_size(self) -> int:
        """Tokens a page, 0 in a graph without a KV cache."""
        return max((pool.page_size for pool in self.pools.values()), default=0)

    def step(self, inputs: StepInputs) -> NDArray[np.float32]:
        """The logits [R, V] of one step; the pools are updated.

        Raises UsageError that names the input that breaks the contract, or the size that the engine was not
        built for; the pools are then as before. Raises BundleError when TensorRT or a kernel fails; the pools
        are then lost: make a new session.
        """
        check_step(
            inputs,
            vocab_size=self.vocab_size,
            num_slots=self.num_slots,
            num_pages=self.num_pages,
            page_size=self.page_size,
        )
        num_rows = len(inputs.logits_row)
        # An engine takes one of each at least: a step that wants no logits has a row of them that is not read.
        sizes = StepSizes.of(inputs).at_least(self._limits[0][0])
        index = self._choose(sizes)
        inputs = padded(inputs, sizes)
        try:
            self._device.make_current()
            if index == 0 and is_decode(inputs):
                self._run_decode(inputs)
            else:
                self._run(self._whole[index], inputs)
            logits_RV = np.empty((num_rows, self.vocab_size), dtype=np.float32)
            self._device.read(self._buffers[LOGITS], logits_RV)
        except CudaError as error:
            raise BundleError(f"a step failed on the GPU: {error}; {because(self._opened.log)}") from error
        return logits_RV

    def pool(self, name: str) -> NDArray[Any]:
        """A copy of a pool's values, scratch row first."""
        values = np.empty(self._pool_shape(name), dtype=self.pools[name].dtype.numpy)
        self._device.make_current()
        self._device.read(self._buffers[name], values)
        return values

    def set_pool(self, name: str, values: NDArray[Any]) -> None:
        """Fill a pool, converting to its dtype; raises UsageError when the shape is another."""
        shape = self._pool_shape(name)
        if values.shape != shape:
            raise UsageError(f"{name} has shape {list(shape)}, not {list(values.shape)}")
        self._device.make_current()
        self._device.write(
            self._buffers[name], np.ascontiguousarray(values.astype(self.pools[name].dtype.numpy))
        )
        self._device.synchronize()

    def _pool_shape(self, name: str) -> tuple[int, ...]:
        if name not in self.pools:
            raise UsageError(f"the graph has no pool {name}", hint="its pools: " + ", ".join(self.pools))
        return self.pools[name].shape(self.num_slots, self.num_pages)

    @property
    def _num_profiles(self) -> int:
        return int(self._opened.engine.num_optimization_profiles)

    def _shapes(self, name: str, index: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """The least and the most shape of an input in a profile."""
        least, _, most = self._opened.engine.get_tensor_profile_shape(name, index)
        return tuple(least), tuple(most)

    def _bounds(self, index: int) -> tuple[StepSizes, StepSizes]:
        """The least and the most sizes of a step in a profile; an axis that no input has is not bounded."""
        sizes: list[dict[str, int]] = [{}, {}]
        for axis, (name, position) in SIZED_BY.items():
            shapes = self._shapes(name, index) if name in self._inputs else None
            for i, unbounded in enumerate((0, np.iinfo(np.int32).max)):
                sizes[i][axis] = shapes[i][position] if shapes else int(unbounded)
        return StepSizes(**sizes[0]), StepSizes(**sizes[1])

    def _choose(self, sizes: StepSizes) -> int:
        """The first profile that holds a step; raises UsageError where none does."""
        for index, limits in enumerate(self._limits):
            if sizes.fits(*limits):
                return index
        most = self._limits[-1][1]
        raise UsageError(
            f"a step of {sizes.T} tokens, {sizes.B} sequences, {sizes.M} pages each and {sizes.R} rows of logits"
            f" is over the engine's {most.T}, {most.B}, {most.M} and {most.R}",
            hint="build with a larger --max-tokens, --max-sequences or --max-context",
        )

    def _check_places(self) -> None:
        """Raise BundleError where TensorRT wants an input in the host's memory: it decides a shape, by a mistake."""
        device, engine = self._opened.trt.TensorLocation.DEVICE, self._opened.engine
        for name in (*self._inputs, *self.pools):
            if engine.get_tensor_location(name) != device:
                raise BundleError(
                    f"the engine takes {name} from the host's memory: a shape depends on its values"
                )

    def _check_rows(self) -> None:
        for name in self.pools:
            (least, *_), (most, *_) = self._shapes(name, 0)
            rows = self._pool_shape(name)[0]
            if not least <= rows <= most:
                raise UsageError(
                    f"{name} would have {rows} rows, the engine takes {least} to {most}",
                    hint="build with a larger --max-sequences or --max-context",
                )

    def _allocate(self) -> None:
        """A buffer for each input and output at its largest, the pools, and the contexts' common scratch."""
        self._buffers: dict[str, Memory] = {}
        for name in self._inputs:
            most = [self._shapes(name, index)[1] for index in range(self._num_profiles)]
            count = max(int(np.prod(shape)) for shape in most)
            self._buffers[name] = self._device.allocate(count * np.dtype(self._dtypes[name]).itemsize)
        rows = max(most.R for _, most in self._limits)
        self._buffers[LOGITS] = self._device.allocate(rows * self.vocab_size * 4)
        for name, pool in self.pools.items():
            self._buffers[name] = self._device.allocate(self._pool_shape(name)[0] * pool.row_bytes)
            self._device.clear(self._buffers[name])
        engine = self._opened.engine
        needed = [engine.get_device_memory_size_for_profile_v2(index) for index in range(self._num_profiles)]
        self._scratch = self._device.allocate(max(needed))

    def _new_context(self, index: int) -> _Context:
        """A context of a profile, all its memory bound: the pools' inputs and outputs to the same."""
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
            raise BundleError(f"the engine is not what the manifest says: {because(self._opened.log)}")
        return _Context(handle)

    def _run(self, context: _Context, inputs: StepInputs) -> None:
        self._write(inputs)
        self._set_shapes(context, inputs)
        self._enqueue(context)

    def _run_decode(self, inputs: StepInputs) -> None:
        """A decode step, padded to a batch size whose context is its own and never sees another shape."""
        own = StepSizes.of(inputs)
        size = next(size for size in self._batch_sizes if size >= max(own.T, own.B, own.R))
        pages = self._limits[0][1].M if "page_table" in self._inputs else own.M
        sizes = StepSizes(T=size, B=size, M=pages, R=size)
        context = self._decode.get(size) or self._decode.setdefault(size, self._new_context(0))
        inputs = padded(inputs, sizes)
        self._write(inputs)
        if not context.has_run:
            self._set_shapes(context, inputs)
        if not (context.has_run and self._capture):
            self._enqueue(context)
            context.has_run = True
            return
        if context.graph is None:
            # Recorded, not run: TensorRT has settled everything for this shape in the run before.
            with self._device.capturing() as graph:
                self._enqueue(context)
            context.graph = graph
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
            raise BundleError(f"the engine has an input {missing[0]} that the manifest does not know")

    def _enqueue(self, context: _Context) -> None:
        if not context.handle.execute_async_v3(self._device.stream):
            raise BundleError(f"TensorRT failed in a step: {because(self._opened.log)}")
