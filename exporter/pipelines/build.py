"""The stages of a build in order, one line each, in a workspace that survives a kill."""

from __future__ import annotations

import dataclasses
import errno
import logging
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

from nemotrt.exporter import environment
from nemotrt.exporter.artifacts import CompiledEngine, LoweredGraph
from nemotrt.exporter.checkpoint.layer_selection import partial_model
from nemotrt.exporter.checkpoint.loaded_model import LoadedModel
from nemotrt.exporter.checkpoint.quant_config import cache_notes
from nemotrt.exporter.config import COMPUTE_DTYPES, PRECISION_OF_DTYPE, PRESETS, BuildConfig
from nemotrt.exporter.engines.targets import AUTO, ONNX, Target, settle
from nemotrt.exporter.errors import CompileError, ExportError, UsageError, ValidationError
from nemotrt.exporter.pipelines import estimates
from nemotrt.exporter.progress import SILENT, Advance, Progress
from nemotrt.exporter.report import json_file
from nemotrt.exporter.report.model import Gate, ValidationReport
from nemotrt.exporter.workspace import Workspace, check_output, digest

GRAPH = "model.onnx"
QUANTIZED = "quantized"
MAX_GATES_SAID = 10

DISK_HINTS = {
    errno.ENOSPC: "free some space, or choose another --output",
    errno.EDQUOT: "free some space, or choose another --output",
    errno.EROFS: "choose another --output",
    errno.EACCES: "choose another --output, or change its permissions",
    errno.EPERM: "choose another --output, or change its permissions",
}
"""The system's error → what to do about it."""


log = logging.getLogger(__name__)


class BuildLog:
    """Shows the progress of a build and collects the lines of its log, without times: equal builds have equal logs."""

    def __init__(self, progress: Progress) -> None:
        self._progress = progress
        self.lines: list[str] = []

    def note(self, text: str, level: int = logging.INFO) -> None:
        """Log a line below its stage."""
        self.lines.append(f"{'':<9} {text}")
        log.log(level, text)

    @contextmanager
    def stage(
        self, name: str, what: str, *, total: int | None = None, is_bytes: bool = False
    ) -> Iterator[Advance]:
        """Show a stage, and log its title when it ends."""
        outcome = "  stopped"
        try:
            with self._progress.stage(name, what, total=total, is_bytes=is_bytes) as advance:
                yield advance
            outcome = ""
        finally:
            self.lines.append(f"{name:<9} {what}{outcome}")


def build(config: BuildConfig, progress: Progress = SILENT) -> dict[str, Any]:
    """Build the bundle at `config.output`; gives what a script wants to know of it.

    Raises ExportError, and then leaves nothing at the output. A build that was killed or interrupted is continued
    by the next one of the same output.
    """
    from nemotrt.exporter.stages.load import load

    console = BuildLog(progress)
    with _disk_errors_in_words(config):
        check_output(config.output, force=config.force)
        with console.stage("load", config.checkpoint.resolve().name):
            model = load(config.checkpoint, config.layers)
        for name, reason in model.config.inert.items():
            console.note(f"{name} changes nothing: {reason}", logging.DEBUG)
        if taken := model.config.chosen_layers:
            console.note(f"{partial_model(taken)} (the bundle says so)")
        if model.not_exported:
            console.note(f"{len(model.not_exported)} tensors (mtp.*) are not exported")
        for note in cache_notes(model.config, config.kv_dtype):
            console.note(f"{note}")
        config, target = _resolved(config, model, console)
        _check_quantization(config, model)
        if config.validate:
            copies = estimates.num_references(config.precision, model.config.layers)
            estimates.check_memory(model, hint=estimates.WITHOUT_WHOLE_STEPS, copies=copies)
        key = digest(_identity(config, model))
        with Workspace.open(config.output, force=config.force) as workspace:
            try:
                return _build(config, target, model, key, workspace, console)
            except (ExportError, OSError):
                workspace.clear()
                raise
            except KeyboardInterrupt:
                if workspace.has_results:
                    log.info(
                        "%s keeps the finished stages: the same command continues from there", workspace.root
                    )
                raise


@contextmanager
def _disk_errors_in_words(config: BuildConfig) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        if error.errno is None:
            raise  # a library's, not the system's
        where = error.filename or config.output.parent
        raise UsageError(f"{where}: {error.strerror}", hint=DISK_HINTS.get(error.errno, "")) from error


def _build(
    config: BuildConfig, target: Target, model: LoadedModel, key: str, workspace: Workspace, console: BuildLog
) -> dict[str, Any]:
    from nemotrt.exporter.stages.bundle import bundle

    model = _quantized(config, model, key, workspace, console)
    graph = _lowered(config, model, key, workspace, console)
    engine = _compiled(config, target, graph, key, workspace, console)
    report = _validated(config, model, graph, key, workspace, console)
    failed = [gate for gate in report.gates if not gate.passed] if report else []
    for gate in failed[:MAX_GATES_SAID]:
        console.note(f"failed: {describe(gate)}")
    if failed and not config.keep_failed:
        raise ValidationError(
            f"{len(failed)} of {len(report.gates) if report else 0} gates failed; the first: {describe(failed[0])}",
            hint="--keep-failed writes the bundle all the same, for looking into it",
        )
    with console.stage("bundle", str(config.output)):
        manifest = bundle(config, model, graph, engine, report, workspace.folder, tuple(console.lines))
        workspace.publish()
    if failed:
        raise ValidationError(
            f"{len(failed)} gates failed; {config.output} says so",
            hint="do not ship it; nemo-export validate --bisect names the layer, the op and the tensor",
        )
    return {
        "bundle": str(config.output),
        "bundle_id": manifest.bundle_id,
        "precision": config.precision,
        "nodes": graph.nodes,
        "weight_bytes": graph.weight_bytes,
        "engine": dataclasses.asdict(engine) if engine else None,
        "validation": dataclasses.asdict(manifest.validation),
    }


def _resolved(config: BuildConfig, model: LoadedModel, console: BuildLog) -> tuple[BuildConfig, Target]:
    """The configuration with every default that depends on the checkpoint or the machine filled in."""
    own = "fp8" if model.config.recipe else PRECISION_OF_DTYPE[model.config.dtype]
    precision = config.precision or own
    target = settle(config.runtime, config.sms, precision)
    if target.runtime != ONNX:
        target = _checked(target, model, dataclasses.replace(config, precision=precision))
    if config.runtime == AUTO:
        console.note(f"runtime: {target.title}" + (f" ({target.why})" if target.why else ""))
    return dataclasses.replace(config, precision=precision, runtime=target.runtime, sms=target.sms), target


def _check_quantization(config: BuildConfig, model: LoadedModel) -> None:
    """Refuse a precision that would undo the checkpoint's quantization, and options of one that is not made here."""
    if model.config.recipe and config.precision != "fp8":
        raise UsageError(
            f"the checkpoint is FP8: --precision {config.precision} would need its weights as they were before",
            hint="use --precision fp8, or the checkpoint that it was quantized from",
        )
    given = {
        "--calibration": config.calibration is not None,
        "--preset": config.preset != PRESETS[0],
        "--exclude": bool(config.exclude),
        "--kv-dtype": config.kv_dtype != "auto"
        and not (config.kv_dtype == "bf16" and model.config.recipe.kv_cache),
    }
    name = next((name for name, is_given in given.items() if is_given), "")
    if name and (model.config.recipe or config.precision != "fp8"):
        why = "the checkpoint is FP8 already" if model.config.recipe else "nothing is quantized"
        raise UsageError(
            f"{name} has no effect: {why}", hint="it goes with --precision fp8 and other weights"
        )


def _quantized(
    config: BuildConfig, model: LoadedModel, key: str, workspace: Workspace, console: BuildLog
) -> LoadedModel:
    """The model as it is, or its weights in FP8 in the workspace where the precision asks for that."""
    if config.precision != "fp8" or model.config.recipe:
        return model
    from nemotrt.exporter.pipelines.quantize import Quantization, calibrated
    from nemotrt.exporter.stages.load import load

    folder = workspace.folder / QUANTIZED

    def run() -> dict[str, Any]:
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir()
        wanted = Quantization(config.calibration, config.preset, config.exclude, config.kv_dtype)
        calibrated(model, wanted, folder, console, per_output=True, note=console.note)
        return {}

    _once("quantize", key, workspace, console, run)
    return dataclasses.replace(load(folder, config.layers), origin=model)


def _checked(target: Target, model: LoadedModel, config: BuildConfig) -> Target:
    """The target, if kernels take the model, and its TensorRT loads and has memory to build in.

    Else the graph alone, where that may be.
    """
    from nemotrt.exporter.engines.kernel_support import check_supported
    from nemotrt.exporter.stages.compile import check_backend

    try:
        check_supported(model.config, config, model.pools(config), target.sms)
        estimates.check_engine_memory(estimates.graph_bytes(model, config.precision))
        check_backend(target)
    except CompileError as error:
        if not target.may_fall_back:
            raise
        return Target(ONNX, why="; ".join(filter(None, (target.why, str(error)))))
    return target


def _identity(config: BuildConfig, model: LoadedModel) -> list[Any]:
    """What decides a stage's result: the tool, the configuration, and the checkpoint's files."""
    files = sorted({tensor.path for weight in model.weights.values() for tensor in weight.tensors})
    stats = [(path.name, path.stat().st_size, path.stat().st_mtime_ns) for path in files]
    fields = {
        name: value
        for name, value in dataclasses.asdict(config).items()
        if name not in ("output", "force", "keep_failed", "validate")
    }
    fields["checkpoint"] = config.checkpoint.resolve()
    return [environment.tool_versions(), fields, dataclasses.asdict(model.config), stats]


def _check_disk(config: BuildConfig, model: LoadedModel) -> None:

    from nemotrt.exporter.checkpoint import weights
    from nemotrt.exporter.lowering import external_data

    dtype = COMPUTE_DTYPES[config.precision]
    placed = external_data.lay_out(
        weights.parameters(model.config, model.weights, dtype), link=config.weights == "link"
    )
    wanted = external_data.allocated_bytes(one for one in placed if one.linked is None)
    if config.runtime != ONNX:
        wanted += estimates.graph_bytes(model, config.precision)  # an engine has the weights once more
    free = shutil.disk_usage(config.output.parent).free
    if wanted > free:
        raise UsageError(
            f"{config.output.parent} has {free / 1e9:.3g} GB free, the bundle needs {wanted / 1e9:.3g} GB",
            hint=DISK_HINTS[errno.ENOSPC],
        )


def _once(
    stage: str, key: str, workspace: Workspace, console: BuildLog, run: Callable[[], dict[str, Any]]
) -> dict[str, Any]:
    """What `run` gives, or what it gave when an earlier build ended the stage with the same inputs."""
    kept: dict[str, Any] | None = workspace.result(stage, key)
    if kept is not None:
        log.info("%s is reused from the previous build", stage)
        console.lines += kept["log"]
        return dict(kept["result"])
    before = len(console.lines)
    result = run()
    environment.give_back_memory()  # the next stage is another, and needs its own
    workspace.record(stage, key, {"result": result, "log": console.lines[before:]})
    return result


def _lowered(
    config: BuildConfig, model: LoadedModel, key: str, workspace: Workspace, console: BuildLog
) -> LoweredGraph:
    """The graph in the workspace; one that an earlier build of the same inputs ended is taken as it is."""
    path = workspace.folder / GRAPH

    def run() -> dict[str, Any]:
        from nemotrt.exporter.stages.lower import lower
        from nemotrt.exporter.stages.trace import trace

        _check_disk(config, model)
        kinds = len(set(model.config.layers))
        with console.stage("trace", f"{len(model.config.layers)} layers, {kinds} kinds"):
            traced = trace(model, config)
        total = estimates.graph_bytes(model, config.precision)
        what = f"{config.precision}, {total / 1e6:.1f} MB of weights"
        done = workspace.kept("lower", key)
        if done:
            log.info("%.3g GB of weights are reused from the previous build", done / 1e9)
        link = config.weights == "link"
        with console.stage("lower", what, total=total, is_bytes=True) as advance:
            graph = lower(
                model,
                traced,
                path,
                link=link,
                resume_from=done,
                advance=advance,
                synced=partial(workspace.keep, "lower", key),
            )
        ops = ", ".join(f"{count} {op}" for op, count in graph.ops.items())
        console.note(f"{graph.nodes} nodes; {ops}", logging.DEBUG)
        return {name: value for name, value in dataclasses.asdict(graph).items() if name != "path"}

    kept = _once("lower", key, workspace, console, run)
    return LoweredGraph(path=path, **{**kept, "linked": tuple(kept["linked"])})


def _compiled(
    config: BuildConfig,
    target: Target,
    graph: LoweredGraph,
    key: str,
    workspace: Workspace,
    console: BuildLog,
) -> CompiledEngine | None:
    """The engine in the workspace; None where none was asked for, or the model has none and that was said."""
    if target.runtime == ONNX:
        return None

    def run() -> dict[str, Any]:
        from nemotrt.exporter.stages.compile import STEPS, compile, prepare

        try:
            with console.stage("kernels", f"and plugin library for {target.gpus}", total=STEPS) as advance:
                prepared = prepare(config, target, graph, advance=advance)
        except CompileError as error:
            if not target.may_fall_back:
                raise
            console.note(f"runtime: {ONNX} ({error})")
            return {}
        with console.stage("compile", f"engine of {target.title}", total=STEPS) as advance:
            engine = compile(config, target, graph, prepared, workspace.folder, advance=advance)
        console.note(f"{engine.num_plugins} ops are plugins", logging.DEBUG)
        if not engine.pools_seen:
            console.note("whether the engine copies pools is not known: TensorRT did not list its layers")
        return dataclasses.asdict(engine)

    kept = _once("compile", digest(key, dataclasses.asdict(target)), workspace, console, run)
    return CompiledEngine(**{**kept, "sms": tuple(kept["sms"])}) if kept else None


def _validated(
    config: BuildConfig,
    model: LoadedModel,
    graph: LoweredGraph,
    key: str,
    workspace: Workspace,
    console: BuildLog,
) -> ValidationReport | None:
    if not config.validate:
        console.note("not validated: the manifest says so")
        return None

    def run() -> dict[str, Any]:
        from nemotrt.exporter.runtime.graph_file import OnnxGraph
        from nemotrt.exporter.validation.validate import num_steps, validate

        total = num_steps(config.precision, len(model.config.layers))
        with console.stage("validate", "ONNX Runtime against PyTorch", total=total) as advance:
            report = validate(model, config, OnnxGraph.read(graph.path), advance=advance)
        passed = sum(gate.passed for gate in report.gates)
        console.note(f"{passed} of {len(report.gates)} gates passed")
        return json_file.as_json(report)

    return json_file.parse(_once("validate", key, workspace, console, run), "the workspace's report")


def describe(gate: Gate) -> str:
    """One gate in words."""
    return f"{gate.scenario}, {gate.output}: {gate.metric} {gate.value:.3g}, limit {gate.limit:.3g}"
