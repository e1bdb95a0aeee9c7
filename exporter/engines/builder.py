"""The program that builds one engine in its own process: `python -m nemotrt.exporter.engines.builder FD`.

It reads an EngineRequest as JSON from stdin and writes events to the file descriptor, one JSON object per line:
`{"step": permille, "phase": name}` during the build, and at the end `{"built": EngineResult}` or
`{"error": text, "hint": text}`. Where it should raise an error, TensorRT may abort its process: then only this one
ends.
"""

import ctypes
import json
import os
import signal
import sys
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from itertools import product
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
from numpy.typing import NDArray

from nemotrt.exporter.errors import CompileError, ExportError
from nemotrt.exporter.runtime.backends import backend, because, load_module, new_log
from nemotrt.exporter.runtime.graph_file import OnnxGraph
from nemotrt.plugins.spec import DOMAIN

PR_SET_PDEATHSIG = 1

Emit = Callable[[dict[str, Any]], None]


@dataclass(frozen=True)
class EngineRequest:
    """The inputs of an engine build. With an empty `graph` the builder only returns its module's version."""

    runtime: str
    graph: str = ""
    library: str = ""
    """The plugin library."""
    output: str = ""
    log: str = ""
    timings: str = ""
    """The timing cache that the build reads, if it exists, and then writes; empty for none."""
    sms: list[int] = field(default_factory=list)
    """GPU generations to build for; empty for the machine's own GPU."""
    profiles: list[dict[str, list[list[int]]]] = field(default_factory=list)
    """Each profile maps an input's name to its min, opt and max shape."""
    plugins: list[str] = field(default_factory=list)
    """The names of the nodes that must become plugin layers."""
    pools: list[str] = field(default_factory=list)
    """The inputs and outputs that only plugins may access."""


@dataclass(frozen=True)
class EngineResult:
    """The outcome of an engine build."""

    version: str
    """The version of the TensorRT module."""
    pools_seen: bool = False
    """Whether the log listed the engine's layers, so that they could be checked for copies of pools."""


def main() -> None:
    """Build the engine that stdin describes."""
    # This process must not outlive its parent.
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    with os.fdopen(int(sys.argv[1]), "w", buffering=1) as events:

        def emit(event: dict[str, Any]) -> None:
            events.write(json.dumps(event) + "\n")

        try:
            result = build(EngineRequest(**json.load(sys.stdin)), emit)
        except ExportError as error:
            emit({"error": str(error), "hint": error.hint})
            raise SystemExit(1) from error
        emit({"built": asdict(result)})


def build(request: EngineRequest, emit: Emit) -> EngineResult:
    """Build the engine into `request.output`; raises ExportError with the reason if TensorRT refuses."""
    trt = load_module(backend(request.runtime))
    if not request.graph:
        return EngineResult(version=trt.__version__)
    with open(request.log, "w", buffering=1, encoding="utf-8") as file:
        log = new_log(trt, file)
        builder = trt.Builder(log)
        log.reasons.clear()  # TensorRT-RTX complains if there is no GPU
        if trt.get_plugin_registry().load_library(request.library) is None:
            raise CompileError(f"TensorRT does not load the plugin library {request.library}: {because(log)}")
        network = builder.create_network(0)
        parser = trt.OnnxParser(network, log)
        mapped = _parse(parser, Path(request.graph), log)
        _check_plugins(trt, network, request.plugins)
        config = builder.create_builder_config()
        _configure(trt, builder, config, request, log)
        config.progress_monitor = monitor = _monitor(trt, emit)
        _write(trt, builder, network, config, request, log)
        _check_pools(log.layers, request.pools)
        if request.timings:
            Path(request.timings).write_bytes(bytes(memoryview(config.get_timing_cache().serialize())))
        del monitor, parser, mapped
    return EngineResult(trt.__version__, bool(log.layers))


def _parse(parser: Any, path: Path, log: Any) -> Mapping[str, NDArray[np.uint8]]:
    """Parse the graph with its weights mapped, not copied; returns the mapped files, which must outlive the parser.

    TensorRT's own reader of external data refuses files that have a second hard link.
    """
    from onnx.external_data_helper import ExternalDataInfo, uses_external_data

    graph = OnnxGraph.read(path).proto
    mapped: dict[str, NDArray[np.uint8]] = {}
    is_parsed = parser.load_model_proto(graph.SerializeToString(), str(path))
    for tensor in filter(uses_external_data, graph.graph.initializer):
        place = ExternalDataInfo(tensor)
        if place.location not in mapped:
            mapped[place.location] = np.memmap(path.parent / place.location, mode="r")
        begin = place.offset or 0
        values = mapped[place.location][begin : begin + (place.length or 0)]
        is_parsed = is_parsed and parser.load_initializer(tensor.name, values.ctypes.data, values.nbytes)
    if is_parsed and parser.parse_model_proto():
        return mapped
    errors = [parser.get_error(i) for i in range(parser.num_errors)[:1]]
    reasons = [f"{error.node_name() or 'the graph'}: {' '.join(error.desc().split())}" for error in errors]
    raise CompileError(f"TensorRT does not take the graph: {because(log, *reasons)}")


def _check_plugins(trt: ModuleType, network: Any, names: list[str]) -> None:
    """Refuse a network in which an op is not one plugin layer: the parser then silently expands the op's function."""
    layers = [network.get_layer(i) for i in range(network.num_layers)]
    plugins = {layer.name for layer in layers if layer.type == trt.LayerType.PLUGIN_V3}
    if missing := [name for name in names if name not in plugins]:
        raise CompileError(
            f"{len(missing)} of {len(names)} {DOMAIN} ops did not become plugin layers, the first {missing[0]}:"
            " TensorRT expanded them into standard operators, which is many times slower",
            hint="the plugin library and the graph are of different versions: build both again",
        )


def _configure(trt: ModuleType, builder: Any, config: Any, request: EngineRequest, log: Any) -> None:
    """Set the targets, the profiles and the flags for in-place state; the graph sets the precision."""
    config.set_preview_feature(trt.PreviewFeature.ALIASED_PLUGIN_IO_10_03, True)
    for flag in backend(request.runtime).flags:
        config.set_flag(getattr(trt.BuilderFlag, flag))
    if request.sms:
        config.num_compute_capabilities = len(request.sms)
        for i, sm in enumerate(request.sms):
            config.set_compute_capability(getattr(trt.ComputeCapability, f"SM{sm}"), i)
    for shapes in request.profiles:
        profile = builder.create_optimization_profile()
        for name, (low, opt, high) in shapes.items():
            profile.set_shape(name, tuple(low), tuple(opt), tuple(high))
        if config.add_optimization_profile(profile) < 0:
            raise CompileError(f"TensorRT refuses an optimization profile: {because(log)}")
    if request.timings:
        path = Path(request.timings)
        cache = path.read_bytes() if path.is_file() else b""
        if not config.set_timing_cache(config.create_timing_cache(cache), False):
            config.set_timing_cache(config.create_timing_cache(b""), False)  # of another GPU or version


def _monitor(trt: ModuleType, emit: Emit) -> Any:
    """A TensorRT progress monitor that emits the completed fraction of the build in permille."""

    progress = Progress()

    class Monitor(trt.IProgressMonitor):  # type: ignore[name-defined,misc]
        def phase_start(self, phase_name: str, parent_phase: str | None, num_steps: int) -> None:
            progress.start(phase_name, parent_phase, num_steps)
            emit({"step": progress.permille, "phase": phase_name})

        def step_complete(self, phase_name: str, step: int) -> bool:
            before = progress.permille
            progress.complete(phase_name, step)
            if progress.permille > before:
                emit({"step": progress.permille, "phase": phase_name})
            return True

        def phase_finish(self, phase_name: str) -> None:
            progress.finish(phase_name)

    return Monitor()


class Progress:
    """The completed fraction of nested phases; a phase counts as one step of its parent."""

    def __init__(self) -> None:
        self.permille = 0
        self._phases: dict[str, tuple[str | None, int, int]] = {}

    def start(self, name: str, parent: str | None, num_steps: int) -> None:
        """A phase begins, inside `parent` if there is one."""
        self._phases[name] = (parent, num_steps, 0)

    def complete(self, name: str, step: int) -> None:
        """A step of a phase has ended; the first is 0."""
        if name not in self._phases:
            return
        parent, num_steps, _ = self._phases[name]
        self._phases[name] = (parent, num_steps, step + 1)
        roots = [root for root, (above, _, _) in self._phases.items() if above not in self._phases]
        # Outermost phases may follow each other, and a parent may count a child twice: never go back or over.
        done = max((self._done(root) for root in roots), default=0.0)
        self.permille = max(self.permille, min(1000, int(1000 * done)))

    def finish(self, name: str) -> None:
        """A phase has ended."""
        self._phases.pop(name, None)

    def _done(self, name: str) -> float:
        _, num_steps, done = self._phases[name]
        inside = [self._done(child) for child, (parent, _, _) in self._phases.items() if parent == name]
        return min(1.0, (done + min(1.0, sum(inside))) / max(1, num_steps))


def _write(
    trt: ModuleType, builder: Any, network: Any, config: Any, request: EngineRequest, log: Any
) -> None:
    """Build the engine and stream it to its file, without a copy in memory."""
    problems: list[OSError] = []
    with open(request.output, "wb") as file:

        class Writer(trt.IStreamWriter):  # type: ignore[name-defined,misc]
            def write(self, data: bytes) -> int:
                try:
                    return file.write(data)
                except OSError as error:  # an exception cannot pass through TensorRT's frames
                    problems.append(error)
                    return 0

        is_built = builder.build_serialized_network_to_stream(network, config, Writer())
        if problems:
            raise CompileError(
                f"the engine cannot be written: {problems[0].strerror}", hint="free some space for it"
            )
        if not is_built:
            raise CompileError(f"TensorRT cannot build the engine: {because(log)}")
        file.flush()
        os.fsync(file.fileno())


def _check_pools(layers: list[str], pools: list[str]) -> None:
    """Refuse an engine in which a layer other than a plugin accesses a pool: it would copy the pool in every step."""
    others = [line for line in layers if not line.startswith(("Layer(PluginV3)", "Layer(NoOp)"))]
    for line, pool in product(others, pools):
        if f" {pool} (" in f" {line}":
            raise CompileError(
                f"TensorRT copies {pool} instead of updating it in place: {line.partition(',')[0]}",
                hint="report this: the graph must give each pool to one plugin only",
            )


if __name__ == "__main__":
    main()
