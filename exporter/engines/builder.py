"""Builds one engine, as a program of its own: `python -m nemotrt.exporter.engines.builder FD`.

Takes an EngineRequest as JSON on stdin and writes events to the file descriptor, one JSON object a line:
`{"step": permille, "phase": name}` as the build goes on, and at the end `{"built": EngineResult}` or
`{"error": text, "hint": text}`. TensorRT ends its process where it should raise; here that ends nothing else.
"""

from __future__ import annotations

import ctypes
import json
import os
import resource
import signal
import sys
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from types import ModuleType
from typing import IO, Any

import numpy as np
from numpy.typing import NDArray

from nemotrt.exporter.errors import CompileError, ExportError
from nemotrt.exporter.runtime.backends import backend, load_module
from nemotrt.exporter.runtime.graph_file import OnnxGraph
from nemotrt.plugins.spec import DOMAIN

LAYERS = "Engine Layer Information"
"""How the message begins that lists an engine's layers; in the log at its most verbose."""

PR_SET_PDEATHSIG = 1
MAX_REASONS = 3

Emit = Callable[[dict[str, Any]], None]


@dataclass(frozen=True)
class EngineRequest:
    """All that an engine is built from. An empty `graph` asks for the module's version and nothing else."""

    runtime: str
    graph: str = ""
    library: str = ""
    """The plugin library."""
    output: str = ""
    log: str = ""
    timings: str = ""
    """A timing cache of earlier builds, read where there is one and then written; empty where none is kept."""
    sms: list[int] = field(default_factory=list)
    """GPU generations to build for; none for the machine's own GPU."""
    profiles: list[dict[str, list[list[int]]]] = field(default_factory=list)
    """For each profile, an input's name → its least, best and most shape."""
    plugins: list[str] = field(default_factory=list)
    """Names of the nodes that must become plugin layers."""
    pools: list[str] = field(default_factory=list)
    """Inputs and outputs that only plugins may touch."""


@dataclass(frozen=True)
class EngineResult:
    """What was built, and by what."""

    version: str
    """The TensorRT module's own."""
    num_layers: int = 0
    """In the parsed network."""
    pools_seen: bool = False
    """Whether the log named the engine's layers, so that copies of pools could be looked for."""
    peak_bytes: int = 0
    """The builder's resident memory at its highest."""


def main() -> None:
    """Build what stdin asks for."""
    # A build that is killed must not leave this one running.
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
    """Build the engine into `request.output`; raises ExportError that says why there is none."""
    trt = load_module(backend(request.runtime))
    if not request.graph:
        return EngineResult(version=trt.__version__)
    with open(request.log, "w", buffering=1, encoding="utf-8") as file:
        log = _log(trt, file)
        builder = trt.Builder(log)
        log.reasons.clear()  # without a GPU, that there is none
        _load_plugins(trt, request.library, log)
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
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    return EngineResult(trt.__version__, network.num_layers, bool(log.layers), peak)


def _log(trt: ModuleType, file: IO[str]) -> Any:
    """TensorRT's logger: everything into the file, errors and the engine's layers kept too."""
    severities = trt.ILogger.Severity

    class Log(trt.ILogger):  # type: ignore[name-defined,misc]
        def __init__(self) -> None:
            trt.ILogger.__init__(self)
            self.reasons: list[str] = []
            self.layers: list[str] = []

        def log(self, severity: Any, message: str) -> None:
            file.write(f"[{severity.name}] {message}\n")
            if severity <= severities.ERROR:
                self.reasons.append(" ".join(message.split()))
            elif message.startswith(LAYERS):
                self.layers += message.splitlines()[1:]

    return Log()


def _because(log: Any, extra: str = "") -> str:
    reasons = list(dict.fromkeys([*log.reasons, *([extra] if extra else [])]))
    return "; ".join(reasons[:MAX_REASONS]) or "it gave no reason"


def _load_plugins(trt: ModuleType, library: str, log: Any) -> None:
    if trt.get_plugin_registry().load_library(library) is None:
        raise CompileError(f"{library} is no plugin library that TensorRT loads: {_because(log)}")


def _parse(parser: Any, path: Path, log: Any) -> Mapping[str, NDArray[np.uint8]]:
    """Parse the graph, its weights where they lie; gives the mapped files, which must outlive the parser.

    TensorRT reads them too if it is left to, but takes none that has a second hard link.
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
    said = ""
    if parser.num_errors:
        error = parser.get_error(0)
        said = f"{error.node_name() or 'the graph'}: {' '.join(error.desc().split())}"
    raise CompileError(f"TensorRT does not take the graph: {_because(log, said)}")


def _check_plugins(trt: ModuleType, network: Any, wanted: list[str]) -> None:
    """Refuse a network in which an op is not one plugin layer: the parser builds what it is made of, in silence."""
    layers = [network.get_layer(i) for i in range(network.num_layers)]
    found = {layer.name for layer in layers if layer.type == trt.LayerType.PLUGIN_V3}
    missing = [name for name in wanted if name not in found]
    if missing:
        raise CompileError(
            f"{len(missing)} of {len(wanted)} {DOMAIN} ops did not become plugin layers, the first {missing[0]}:"
            " TensorRT took the standard operators that they stand for, which is many times slower",
            hint="the plugin library and the graph are of different versions: build both again",
        )


def _configure(trt: ModuleType, builder: Any, config: Any, request: EngineRequest, log: Any) -> None:
    """Targets, profiles and what state in place needs; precision is in the graph."""
    config.set_preview_feature(trt.PreviewFeature.ALIASED_PLUGIN_IO_10_03, True)
    for flag in backend(request.runtime).flags:
        config.set_flag(getattr(trt.BuilderFlag, flag))
    if request.sms:
        config.num_compute_capabilities = len(request.sms)
        for i, sm in enumerate(request.sms):
            config.set_compute_capability(getattr(trt.ComputeCapability, f"SM{sm}"), i)
    for shapes in request.profiles:
        profile = builder.create_optimization_profile()
        for name, (least, best, most) in shapes.items():
            profile.set_shape(name, tuple(least), tuple(best), tuple(most))
        if config.add_optimization_profile(profile) < 0:
            raise CompileError(f"TensorRT refuses an optimisation profile: {_because(log)}")
    if request.timings:
        path = Path(request.timings)
        kept = path.read_bytes() if path.is_file() else b""
        if not config.set_timing_cache(config.create_timing_cache(kept), False):
            config.set_timing_cache(config.create_timing_cache(b""), False)  # of another GPU or version


def _monitor(trt: ModuleType, emit: Emit) -> Any:
    """TensorRT's progress, as the part of the build that is done, in permille."""

    class Monitor(trt.IProgressMonitor):  # type: ignore[name-defined,misc]
        def __init__(self) -> None:
            trt.IProgressMonitor.__init__(self)
            self.progress = Progress()

        def phase_start(self, phase_name: str, parent_phase: str | None, num_steps: int) -> None:
            self.progress.start(phase_name, parent_phase, num_steps)
            emit({"step": self.progress.permille, "phase": phase_name})

        def step_complete(self, phase_name: str, step: int) -> bool:
            before = self.progress.permille
            self.progress.complete(phase_name, step)
            if self.progress.permille > before:
                emit({"step": self.progress.permille, "phase": phase_name})
            return True

        def phase_finish(self, phase_name: str) -> None:
            self.progress.finish(phase_name)

    return Monitor()


class Progress:
    """How far nested phases are: a phase counts as one step of the one that it is in."""

    def __init__(self) -> None:
        self.permille = 0
        self._phases: dict[str, tuple[str | None, int, int]] = {}

    def start(self, name: str, parent: str | None, num_steps: int) -> None:
        """A phase begins inside another, or inside none."""
        self._phases[name] = (parent, num_steps, 0)

    def complete(self, name: str, step: int) -> None:
        """A step of a phase has ended, counted from 0."""
        if name not in self._phases:
            return
        parent, num_steps, _ = self._phases[name]
        self._phases[name] = (parent, num_steps, step + 1)
        roots = [root for root, (above, _, _) in self._phases.items() if above not in self._phases]
        # Several outermost phases may follow each other, and a parent may count a child twice: never back, never over.
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
    """The engine into its file piece by piece: no copy of it is in memory."""
    problems: list[OSError] = []
    with open(request.output, "wb") as file:

        class Writer(trt.IStreamWriter):  # type: ignore[name-defined,misc]
            def __init__(self) -> None:
                trt.IStreamWriter.__init__(self)

            def write(self, data: bytes) -> int:
                try:
                    return file.write(data)
                except OSError as error:  # it cannot cross TensorRT's frames
                    problems.append(error)
                    return 0

        is_built = builder.build_serialized_network_to_stream(network, config, Writer())
        if problems:
            raise CompileError(
                f"the engine cannot be written: {problems[0].strerror}", hint="free some space for it"
            )
        if not is_built:
            raise CompileError(f"TensorRT builds no engine: {_because(log)}")
        file.flush()
        os.fsync(file.fileno())


def _check_pools(layers: list[str], pools: list[str]) -> None:
    """Refuse an engine in which a layer that is no plugin touches a pool: it would copy the whole pool at each step."""
    for line in layers:
        if not line.startswith(("Layer(PluginV3)", "Layer(NoOp)")):
            names = [pool for pool in pools if f" {pool} (" in f" {line}"]
            if names:
                raise CompileError(
                    f"TensorRT copies {names[0]} instead of updating it in place: {line.partition(',')[0]}",
                    hint="report this: the graph must give each pool to one plugin only",
                )


if __name__ == "__main__":
    main()
