"""Parts of a bundle's graph as engines of their own, each built when it is opened, on this machine for its GPU."""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from nemotrt.exporter.engines.builder import EngineRequest
from nemotrt.exporter.engines.builder_process import run_builder
from nemotrt.exporter.engines.shape_profiles import Bounds, EngineProfile
from nemotrt.exporter.errors import UsageError
from nemotrt.exporter.runtime.backends import Backend, backend
from nemotrt.exporter.runtime.cuda import CudaError, Device
from nemotrt.exporter.runtime.engine_file import check_libraries, engine_profile, load_engine
from nemotrt.exporter.runtime.graph_file import OnnxGraph
from nemotrt.exporter.runtime.manifest import Manifest
from nemotrt.exporter.runtime.step import StepInputs
from nemotrt.exporter.validation.plan import Workload
from nemotrt.exporter.validation.runners.engine_part import EnginePart
from nemotrt.exporter.validation.scenarios import NUM_SLOTS
from nemotrt.plugins.spec import DOMAIN

if TYPE_CHECKING:
    from onnx import ValueInfoProto


class EngineParts:
    """Opens parts with the TensorRT and the plugin library of a bundle's engine."""

    def __init__(
        self, bundle: Path, manifest: Manifest, steps: Sequence[StepInputs], workload: Workload
    ) -> None:
        """Raises BundleError where the bundle has no engine, or its library was changed; UsageError without a GPU."""
        profile = engine_profile(bundle, manifest)
        self._backend: Backend = backend(profile.runtime)
        (self._library,) = check_libraries(bundle, manifest)
        self._sizes = sizes(steps, workload)
        try:
            self._device = Device()
        except CudaError as error:
            raise UsageError(f"{bundle}'s parts are built and run on a GPU: {error}") from error

    def open(self, graph: OnnxGraph) -> EnginePart:
        """A part; raises CompileError where TensorRT does not build it."""
        with tempfile.TemporaryDirectory(prefix="nemo-part-") as folder:
            sms = () if self._backend.needs_gpu else (self._device.gpu.sm,)
            request = part_request(graph, self._sizes, self._backend, self._library, Path(folder), sms)
            run_builder(request, self._backend)
            opened = load_engine(self._backend, (self._library,), Path(request.output))
        inputs, outputs = _dtypes(graph.proto.graph.input), _dtypes(graph.proto.graph.output)
        return EnginePart(opened, self._device, inputs, outputs)


def sizes(steps: Sequence[StepInputs], workload: Workload) -> EngineProfile:
    """What the steps have of each axis, as an engine's one profile."""
    found = {
        "T": [len(step.input_ids) for step in steps],
        "B": [len(step.context_len) for step in steps],
        "B+1": [len(step.query_start) for step in steps],
        "M": [step.page_table.shape[1] for step in steps],
        "R": [len(step.logits_row) for step in steps],
        "S": [NUM_SLOTS],
        "K": [workload.num_pages],
    }
    return EngineProfile(
        "part", {axis: Bounds(min(seen), max(seen), max(seen)) for axis, seen in found.items()}
    )


def part_request(
    graph: OnnxGraph,
    profile: EngineProfile,
    used: Backend,
    library: Path,
    folder: Path,
    sms: Sequence[int],
) -> EngineRequest:
    """How the part is built in `folder`, into which it is written; its weights are linked, not copied."""
    model, path = graph.proto, folder / "part.onnx"
    path.write_bytes(model.SerializeToString())
    for name in {
        entry.value
        for tensor in model.graph.initializer
        for entry in tensor.external_data
        if entry.key == "location"
    }:
        # The builder maps the file: it takes links, as ONNX's own readers do not.
        (folder / name).symlink_to((graph.path.parent / name).resolve())
    shapes = {value.name: profile.shapes(_axes(value)) for value in model.graph.input}
    pools = [name.removeprefix("next.") for name in _dtypes(model.graph.output) if name.startswith("next.")]
    return EngineRequest(
        runtime=used.runtime,
        graph=str(path),
        library=str(library),
        output=str(folder / "part.engine"),
        log=str(folder / "part.log"),
        sms=list(sms),
        profiles=[{name: [list(shape) for shape in three] for name, three in shapes.items()}],
        plugins=[node.name for node in model.graph.node if node.domain == DOMAIN],
        pools=[name for pool in pools for name in (pool, f"next.{pool}")],
    )


def _axes(value: ValueInfoProto) -> tuple[str | int, ...]:
    return tuple(size.dim_param or size.dim_value for size in value.type.tensor_type.shape.dim)


def _dtypes(values: Sequence[ValueInfoProto]) -> dict[str, str]:
    from onnx import helper

    return {
        value.name: helper.tensor_dtype_to_np_dtype(value.type.tensor_type.elem_type).name for value in values
    }
