"""Compile: build a TensorRT engine whose ops are the plugins, in a child process."""

import shutil
from pathlib import Path

from nemotrt.exporter import environment
from nemotrt.exporter.artifacts import CompiledEngine
from nemotrt.exporter.config import BuildConfig
from nemotrt.exporter.engines.builder import EngineRequest, EngineResult
from nemotrt.exporter.engines.builder_process import run_builder
from nemotrt.exporter.engines.kernel_coverage import check_kernels, plugin_nodes
from nemotrt.exporter.engines.plugin_library import plugin_library
from nemotrt.exporter.engines.shape_profiles import engine_profiles, max_rows
from nemotrt.exporter.engines.targets import Target
from nemotrt.exporter.errors import CompileError
from nemotrt.exporter.progress import Advance, ignore
from nemotrt.exporter.runtime.backends import Backend, backend
from nemotrt.exporter.runtime.graph_file import OnnxGraph
from nemotrt.plugins.kernel_store import cache_folder, digest
from nemotrt.plugins.library import PluginLibrary

LIBRARY = "plugins/libnemo_plugins.so"
LOG = "logs/engine.log"
TIMINGS = "engines/timing.cache"

STEPS = 1000
"""The total of `advance`, in `prepare` and in `compile`."""

KERNEL_STEPS = 900
"""The share of it that compiling kernels has in `prepare`; the rest is linking."""

PARTIAL = ".partial"


def prepare(
    config: BuildConfig, target: Target, graph: OnnxGraph, *, advance: Advance = ignore
) -> PluginLibrary:
    """The plugin library for the target's GPUs, with every kernel that the graph's ops launch on them.

    Raises CompileError that names the op and the property that no kernel supports.
    """
    nodes = plugin_nodes(graph)

    def compiled(done: int, total: int, _: str) -> None:
        advance(KERNEL_STEPS * done // total - KERNEL_STEPS * (done - 1) // total)

    library = plugin_library(config, target.sms, compiled)
    check_kernels(nodes, engine_profiles(config), library, target.sms)
    return library


def compile(
    config: BuildConfig,
    target: Target,
    graph: OnnxGraph,
    library: PluginLibrary,
    folder: Path,
    *,
    advance: Advance = ignore,
) -> CompiledEngine:
    """An engine for the target's GPUs in `folder`, together with the plugin library that it needs.

    Raises CompileError with the cause when TensorRT does not build it, and then leaves no engine. TensorRT's messages
    are in the log, which moves to the user's cache folder if the build fails.
    """
    trt = backend(target.runtime)
    nodes, summary = plugin_nodes(graph), graph.summary
    paths = {name: folder / name for name in (trt.engine, LIBRARY, LOG)}
    for path in paths.values():
        path.parent.mkdir(exist_ok=True)
    shutil.copyfile(library.path, paths[LIBRARY])
    timings = _timings(trt, target)
    request = EngineRequest(
        runtime=trt.runtime,
        graph=str(graph.path),
        library=str(paths[LIBRARY]),
        output=str(paths[trt.engine]) + PARTIAL,
        log=str(paths[LOG]),
        timings=str(timings) if timings else "",
        sms=[] if trt.needs_gpu else list(target.sms),
        profiles=[
            {value.name: [list(shape) for shape in profile.shapes(value.axes)] for value in summary.inputs}
            for profile in engine_profiles(config)
        ],
        plugins=[node.name for node in nodes],
        pools=[name for pool in summary.pools for name in (pool.name, pool.output)],
    )
    result = _build(request, trt, paths[trt.engine], advance)
    if timings:
        shutil.copyfile(timings, folder / TIMINGS)
    return CompiledEngine(
        runtime=trt.runtime,
        version=result.version,
        path=trt.engine,
        sms=target.sms,
        library=LIBRARY,
        library_build=library.description["hash"],
        log=LOG,
        timings=TIMINGS if timings else "",
        max_rows=max_rows(config),
        num_plugins=len(nodes),
        pools_seen=result.pools_seen,
    )


def check_backend(target: Target) -> str:
    """The version of the target's TensorRT, as the builder loads it; raises CompileError when it does not load."""
    trt = backend(target.runtime)
    return run_builder(EngineRequest(runtime=trt.runtime), trt).version


def _timings(trt: Backend, target: Target) -> Path | None:
    """The timing cache of this TensorRT and GPU, in the user's cache folder; None for a builder that keeps none."""
    if not trt.keeps_timings:
        return None
    folder = cache_folder() / "timings"
    folder.mkdir(parents=True, exist_ok=True)
    return folder / f"{digest([environment.tool_versions(), target.runtime, target.sms])[:16]}.cache"


def _build(request: EngineRequest, trt: Backend, engine: Path, advance: Advance) -> EngineResult:
    """Run the builder, and rename the engine when it is complete."""
    partial, log = Path(request.output), Path(request.log)
    try:
        result = run_builder(request, trt, advance=advance)
        partial.rename(engine)
    except CompileError as error:
        if not log.is_file():
            raise
        saved = cache_folder() / "logs" / "engine.failed.log"
        saved.parent.mkdir(parents=True, exist_ok=True)
        shutil.move(log, saved)
        hints = (error.hint, f"TensorRT's messages are in {saved}")
        raise CompileError(str(error), hint="; ".join(filter(None, hints))) from error
    finally:
        partial.unlink(missing_ok=True)
    return result
