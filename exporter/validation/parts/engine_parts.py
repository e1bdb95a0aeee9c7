"""Parts of a bundle's graph as engines, each built for this machine's GPU when it is opened.

**Not executed**: like `engine_session`, it is written against TensorRT's API as its Python modules describe it.
"""

import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import ml_dtypes  # noqa: F401  registers bfloat16 and float8_e4m3fn with NumPy
import numpy as np
from numpy.typing import NDArray

from nemotrt.exporter.engines.builder import EngineRequest
from nemotrt.exporter.engines.builder_process import run_builder
from nemotrt.exporter.engines.shape_profiles import EngineProfile
from nemotrt.exporter.errors import BundleError, UsageError
from nemotrt.exporter.runtime import backends
from nemotrt.exporter.runtime.backends import Backend, because
from nemotrt.exporter.runtime.cuda import CudaError, Device, Memory
from nemotrt.exporter.runtime.engine_session import (
    OpenEngine,
    check_libraries,
    create_context,
    engine_profile,
    load_engine,
)
from nemotrt.exporter.runtime.graph_file import OnnxGraph
from nemotrt.exporter.runtime.manifest import GraphSummary, Manifest
from nemotrt.exporter.runtime.step import StepInputs
from nemotrt.exporter.validation.plan import Workload
from nemotrt.plugins.contract import NEXT
from nemotrt.plugins.spec import DOMAIN


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


class EngineParts:
    """Builds and opens parts with the same TensorRT and plugin library as a bundle's engine."""

    def __init__(
        self, bundle: Path, manifest: Manifest, steps: Sequence[StepInputs], workload: Workload
    ) -> None:
        """Raises BundleError if the bundle has no engine or its library changed, UsageError without a GPU."""
        profile = engine_profile(bundle, manifest)
        self._backend = backends.backend(profile.runtime)
        (self._library,) = check_libraries(bundle, manifest)
        self._profile = part_profile(steps, workload)
        try:
            self._device = Device()
        except CudaError as error:
            raise UsageError(f"the parts of {bundle} run on a GPU only: {error}") from error

    def open(self, graph: OnnxGraph) -> EnginePart:
        """The part as an engine; raises CompileError if TensorRT cannot build it."""
        with tempfile.TemporaryDirectory(prefix="nemo-part-") as folder:
            sms = () if self._backend.needs_gpu else (self._device.gpu.sm,)
            request = part_request(graph, self._profile, self._backend, self._library, Path(folder), sms)
            run_builder(request, self._backend)
            opened = load_engine(self._backend, (self._library,), Path(request.output))
        return EnginePart(opened, self._device, graph.summary)


def part_profile(steps: Sequence[StepInputs], workload: Workload) -> EngineProfile:
    """The range of every axis over the steps, as an engine's only profile."""
    sizes = {
        "T": [len(step.input_ids) for step in steps],
        "B": [len(step.context_len) for step in steps],
        "B+1": [len(step.query_start) for step in steps],
        "M": [step.page_table.shape[1] for step in steps],
        "R": [len(step.logits_row) for step in steps],
        "S": [workload.sizes.num_slots],
        "K": [workload.sizes.num_pages],
    }
    return EngineProfile(
        "part", {axis: (min(values), max(values), max(values)) for axis, values in sizes.items()}
    )


def part_request(
    graph: OnnxGraph,
    profile: EngineProfile,
    backend: Backend,
    library: Path,
    folder: Path,
    sms: Sequence[int],
) -> EngineRequest:
    """A request to build the part, which is written to `folder`, with links to its weights."""
    model, path = graph.proto, folder / "part.onnx"
    path.write_bytes(model.SerializeToString())
    for name in {
        entry.value
        for tensor in model.graph.initializer
        for entry in tensor.external_data
        if entry.key == "location"
    }:
        # Unlike ONNX's readers, the builder accepts links: it maps the files.
        (folder / name).symlink_to((graph.path.parent / name).resolve())
    summary = graph.summary
    shapes = {value.name: profile.shapes(value.axes) for value in summary.inputs}
    return EngineRequest(
        runtime=backend.runtime,
        graph=str(path),
        library=str(library),
        output=str(folder / "part.engine"),
        log=str(folder / "part.log"),
        sms=list(sms),
        profiles=[{name: [list(shape) for shape in three] for name, three in shapes.items()}],
        plugins=[node.name for node in model.graph.node if node.domain == DOMAIN],
        pools=[name for pool in summary.pools for name in (pool.name, pool.output)],
    )
