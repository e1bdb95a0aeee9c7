"""Parts of a bundle's graph as engines, each built for this machine's GPU when it is opened."""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from pathlib import Path

from nemotrt.exporter.engines.builder import EngineRequest
from nemotrt.exporter.engines.builder_process import run_builder
from nemotrt.exporter.engines.shape_profiles import EngineProfile
from nemotrt.exporter.errors import UsageError
from nemotrt.exporter.runtime import backends
from nemotrt.exporter.runtime.backends import Backend
from nemotrt.exporter.runtime.cuda import CudaError, Device
from nemotrt.exporter.runtime.engine_session import check_libraries, engine_profile, load_engine
from nemotrt.exporter.runtime.graph_file import OnnxGraph
from nemotrt.exporter.runtime.manifest import Manifest
from nemotrt.exporter.runtime.step import StepInputs
from nemotrt.exporter.validation.plan import Workload
from nemotrt.exporter.validation.runners.engine_part import EnginePart
from nemotrt.exporter.validation.scenarios import NUM_SLOTS
from nemotrt.plugins.spec import DOMAIN


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
        "S": [NUM_SLOTS],
        "K": [workload.num_pages],
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
