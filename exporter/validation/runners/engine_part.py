"""A part of a graph as an engine of its own: every run takes all inputs and gives all outputs.

**Not executed**: like `engine_session`, it is written against TensorRT's API as its Python modules describe it.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import ml_dtypes  # noqa: F401  registers bfloat16 and float8_e4m3fn with NumPy
import numpy as np
from numpy.typing import NDArray

from nemotrt.exporter.errors import BundleError
from nemotrt.exporter.runtime.backends import because
from nemotrt.exporter.runtime.cuda import CudaError, Device, Memory
from nemotrt.exporter.runtime.engine_session import OpenEngine, create_context
from nemotrt.exporter.runtime.manifest import GraphSummary
from nemotrt.plugins.contract import NEXT


class EnginePart:
    """An engine with one profile and no state; the plugin that updates a pool overwrites the input's buffer."""

    def __init__(self, opened: OpenEngine, device: Device, graph: GraphSummary) -> None:
        """Raises BundleError if the GPU has too little memory."""
        self._opened, self._device, self._graph = opened, device, graph
        gpu = device.gpu
        self.runs_as = (
            f"{opened.backend.title} {opened.trt.__version__} on {gpu.name} (SM {gpu.sm}), part by part"
        )
        try:
            device.make_current()
            self._scratch = device.allocate(opened.engine.get_device_memory_size_for_profile_v2(0))
        except CudaError as error:
            raise BundleError(f"{gpu.name} has no room for a part's scratch memory: {error}") from error
        self._context = create_context(opened)
        self._context.set_device_memory(self._scratch.address, self._scratch.num_bytes)
        self._check("a profile", self._context.set_optimization_profile_async(0, device.stream))
        device.synchronize()

    def run(self, feeds: Mapping[str, NDArray[Any]]) -> dict[str, NDArray[Any]]:
        """Every output by name, floats in FP32; `feeds` may hold more than the part's inputs."""
        try:
            self._device.make_current()
            return self._run(feeds)
        except CudaError as error:
            raise BundleError(f"a part failed on the GPU: {error}; {because(self._opened.log)}") from error

    def _run(self, feeds: Mapping[str, NDArray[Any]]) -> dict[str, NDArray[Any]]:
        buffers: dict[str, Memory] = {}
        for value in self._graph.inputs:
            array = np.ascontiguousarray(feeds[value.name].astype(value.dtype))
            buffers[value.name] = self._device.allocate(array.nbytes)
            self._device.write(buffers[value.name], array)
            self._check(value.name, self._context.set_input_shape(value.name, array.shape))
            self._check(value.name, self._context.set_tensor_address(value.name, buffers[value.name].address))
        if missing := self._context.infer_shapes():
            raise BundleError(f"the part's engine has an input {missing[0]}, which its graph lacks")
        results = {}
        for value in self._graph.outputs:
            array = np.empty(tuple(self._context.get_tensor_shape(value.name)), value.dtype)
            pool = value.name.removeprefix(NEXT)
            is_pool = pool != value.name
            buffers[value.name] = buffers[pool] if is_pool else self._device.allocate(array.nbytes)
            self._check(value.name, self._context.set_tensor_address(value.name, buffers[value.name].address))
            results[value.name] = array
        self._check("the step", self._context.execute_async_v3(self._device.stream))
        for name, array in results.items():
            self._device.read(buffers[name], array)
        return {
            name: array if array.dtype.kind in "iub" else array.astype(np.float32)
            for name, array in results.items()
        }

    def _check(self, subject: str, is_accepted: bool) -> None:
        if not is_accepted:
            raise BundleError(f"the part's engine refuses {subject}: {because(self._opened.log)}")
