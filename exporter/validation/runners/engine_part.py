"""A part of a graph as an engine of its own, run once at a time on the inputs it is given.

**Not executed**: as `engine_session`, written against TensorRT's API as its Python modules describe it.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import ml_dtypes  # noqa: F401 - teaches NumPy the names bfloat16 and float8_e4m3fn
import numpy as np
from numpy.typing import NDArray

from nemotrt.exporter.errors import BundleError
from nemotrt.exporter.runtime.cuda import CudaError, Device, Memory
from nemotrt.exporter.runtime.engine_file import OpenEngine, because, create_context
from nemotrt.plugins.contract import NEXT


class EnginePart:
    """An engine of one profile without state: a pool's output is what its plugin left in the input's place."""

    def __init__(
        self, opened: OpenEngine, device: Device, inputs: Mapping[str, str], outputs: Mapping[str, str]
    ) -> None:
        """`inputs` and `outputs` are names → NumPy's names of dtypes; raises BundleError where there is no room."""
        self._opened, self._device = opened, device
        self._inputs, self._outputs = inputs, outputs
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
        self._accept("a profile", self._context.set_optimization_profile_async(0, device.stream))
        device.synchronize()

    def run(self, feeds: Mapping[str, NDArray[Any]]) -> dict[str, NDArray[Any]]:
        """Every output by its name, in FP32 where it is no integer; `feeds` may hold more than the part takes."""
        try:
            self._device.make_current()
            return self._run(feeds)
        except CudaError as error:
            raise BundleError(f"a part failed on the GPU: {error}; {because(self._opened.log)}") from error

    def _run(self, feeds: Mapping[str, NDArray[Any]]) -> dict[str, NDArray[Any]]:
        held: dict[str, Memory] = {}
        for name, dtype in self._inputs.items():
            values = np.ascontiguousarray(feeds[name].astype(dtype))
            held[name] = self._device.allocate(values.nbytes)
            self._device.write(held[name], values)
            self._accept(name, self._context.set_input_shape(name, values.shape))
            self._accept(name, self._context.set_tensor_address(name, held[name].address))
        if missing := self._context.infer_shapes():
            raise BundleError(f"the part's engine has an input {missing[0]} that its graph has not")
        results = {}
        for name, dtype in self._outputs.items():
            results[name] = np.empty(tuple(self._context.get_tensor_shape(name)), dtype)
            pool = name.removeprefix(NEXT)
            held[name] = held[pool] if pool != name else self._device.allocate(results[name].nbytes)
            self._accept(name, self._context.set_tensor_address(name, held[name].address))
        self._accept("the step", self._context.execute_async_v3(self._device.stream))
        for name, values in results.items():
            self._device.read(held[name], values)
        return {name: _readable(values) for name, values in results.items()}

    def _accept(self, what: str, is_accepted: bool) -> None:
        if not is_accepted:
            raise BundleError(f"the part's engine refuses {what}: {because(self._opened.log)}")


def _readable(values: NDArray[Any]) -> NDArray[Any]:
    is_whole = values.dtype.kind in "iub"
    return values if is_whole else values.astype(np.float32)
