"""Compile: the graph as a TensorRT engine whose ops are our plugins, built in a process of its own."""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from pathlib import Path

from nemotrt.exporter import environment
from nemotrt.exporter.artifacts import CompiledEngine, LoweredGraph
from nemotrt.exporter.config import BuildConfig
from nemotrt.exporter.engines.builder import EngineRequest, EngineResult
from nemotrt.exporter.engines.builder_process import run_builder
from nemotrt.exporter.engines.plugin_library import plugin_library
from nemotrt.exporter.engines.plugin_nodes import PluginNode, check_kernels, plugin_nodes
from nemotrt.exporter.engines.shape_profiles import EngineProfile, engine_profiles, max_rows
from nemotrt.exporter.engines.targets import Target
from nemotrt.exporter.errors import CompileError
from nemotrt.exporter.progress import Advance, ignore
from nemotrt.exporter.runtime.backends import Backend, backend
from nemotrt.exporter.runtime.graph_file import OnnxGraph
from nemotrt.exporter.runtime.graph_summary import describe_graph
from nemotrt.plugins.kernel_store import cache_folder, digest
from nemotrt.plugins.library import PluginLibrary

LIBRARY = "plugins/libnemo_plugins.so"
LOG = "logs/engine.log"
TIMINGS = "engines/timing.cache"

STEPS = 1000
"""What `advance` hears of in all."""

KERNEL_STEPS = 900
"""Of them, those of compiling kernels; linking takes the rest."""

PARTIAL = ".partial"


@dataclass(frozen=True)
class Prepared:
    """What an engine needs beside the graph, found to fit it."""

    library: PluginLibrary
    nodes: tuple[PluginNode, ...]
    profiles: tuple[EngineProfile, ...]


def prepare(
    config: BuildConfig,
    target: Target,
    graph: LoweredGraph,
    *,
    advance: Advance = ignore,
) -> Prepared:
    """The plugin library for the target's GPUs, with every kernel that the graph's ops launch on them.

    Raises CompileError that names the op, and what it asks for that no kernel does.
    """
    profiles = engine_profiles(config)
    nodes = plugin_nodes(graph.path)

    def compiled(done: int, total: int, _: str) -> None:
        advance(KERNEL_STEPS * done // total - KERNEL_STEPS * (done - 1) // total)

    library = plugin_library(config, target.sms, compiled)
    check_kernels(nodes, profiles, library, target.sms)
    return Prepared(library, nodes, profiles)


def compile(
    config: BuildConfig,
    target: Target,
    graph: LoweredGraph,
    prepared: Prepared,
    folder: Path,
    *,
    advance: Advance = ignore,
) -> CompiledEngine:
    """An engine for the target's GPUs below `folder`, beside the plugin library that it needs.

    Raises CompileError with the cause when TensorRT does not build it; then no engine is there, whole or half. What
    TensorRT said is in the log, in the user's cache folder where the build failed.
    """
    used = backend(target.runtime)
    library, nodes = prepared.library, prepared.nodes
    summary = describe_graph(OnnxGraph.read(graph.path))

    paths = {name: folder / name for name in (used.engine, LIBRARY, LOG)}
    for path in paths.values():
        path.parent.mkdir(exist_ok=True)
    shutil.copyfile(library.path, paths[LIBRARY])
    kept_timings = _timings(used, target)
    request = EngineRequest(
        runtime=used.runtime,
        graph=str(graph.path),
        library=str(paths[LIBRARY]),
        output=str(paths[used.engine]) + PARTIAL,
        log=str(paths[LOG]),
        timings=str(kept_timings) if kept_timings else "",
        sms=[] if used.needs_gpu else list(target.sms),
        profiles=[
            {edge.name: [list(shape) for shape in profile.shapes(edge.axes)] for edge in summary.inputs}
            for profile in prepared.profiles
        ],
        plugins=[node.name for node in nodes],
        pools=[name for pool in summary.pools for name in (pool.name, pool.output)],
    )
    result = _build(request, used, paths[used.engine], advance)
    if kept_timings:
        shutil.copyfile(kept_timings, folder / TIMINGS)
    return CompiledEngine(
        runtime=used.runtime,
        version=result.version,
        path=used.engine,
        sms=target.sms,
        library=LIBRARY,
        library_build=library.description["hash"],
        log=LOG,
        timings=TIMINGS if kept_timings else "",
        max_rows=max_rows(config),
        num_plugins=len(nodes),
        pools_seen=result.pools_seen,
        peak_bytes=result.peak_bytes,
    )


def check_backend(target: Target) -> str:
    """The version of the target's TensorRT as the builder loads it; raises CompileError where it does not load."""
    used = backend(target.runtime)
    return run_builder(EngineRequest(runtime=used.runtime), used).version


def _timings(used: Backend, target: Target) -> Path | None:
    """Where timings of earlier builds are kept for this TensorRT and GPU; None where none are made."""
    if not used.keeps_timings:
        return None
    folder = cache_folder() / "timings"
    folder.mkdir(parents=True, exist_ok=True)
    return folder / f"{digest([environment.tool_versions(), target.runtime, target.sms])[:16]}.cache"


def _build(request: EngineRequest, used: Backend, engine: Path, advance: Advance) -> EngineResult:
    """Run the builder; the engine has its name only when it is whole."""
    partial, log = Path(request.output), Path(request.log)
    try:
        result = run_builder(request, used, advance=advance)
        partial.rename(engine)
    except CompileError as error:
        kept = _keep_log(log)
        if kept is None:
            raise
        raise CompileError(
            str(error), hint=f"{error.hint}; {kept} has all that was said".lstrip("; ")
        ) from error
    finally:
        partial.unlink(missing_ok=True)
    return result


def _keep_log(log: Path) -> Path | None:
    """Move a failed build's log to where it outlives the build; None where nothing was logged."""
    if not log.is_file():
        return None
    kept = cache_folder() / "logs" / "engine.failed.log"
    kept.parent.mkdir(parents=True, exist_ok=True)
    shutil.move(log, kept)
    return kept
