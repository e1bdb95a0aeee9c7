"""Builds a bundle: every stage in order, in a workspace that survives a kill."""

import dataclasses
import errno
import logging
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

from nemotrt.exporter import environment
from nemotrt.exporter.artifacts import CompiledEngine, LoweredGraph, QuantizedCheckpoint, ZeroWeights
from nemotrt.exporter.checkpoint import zero_weights
from nemotrt.exporter.checkpoint.layer_selection import partial_model
from nemotrt.exporter.checkpoint.loaded_model import LoadedModel, stored_parameters
from nemotrt.exporter.checkpoint.quant_config import cache_notes
from nemotrt.exporter.checkpoint.side_files import check_ignored, check_residual, end_token_notes
from nemotrt.exporter.config import PRESETS, BuildConfig, Precision
from nemotrt.exporter.engines.targets import AUTO, ONNX, Target, settle
from nemotrt.exporter.errors import CompileError, ExportError, UsageError, ValidationError
from nemotrt.exporter.lowering import data_layout
from nemotrt.exporter.pipelines import estimates
from nemotrt.exporter.progress import SILENT, BuildLog, Progress
from nemotrt.exporter.report.model import Gate, ValidationReport
from nemotrt.exporter.runtime.graph_file import OnnxGraph
from nemotrt.exporter.runtime.manifest import ValidationSummary
from nemotrt.exporter.workspace import Workspace, check_output, digest

GRAPH = "model.onnx"
QUANTIZED = "quantized"
MAX_REPORTED_GATES = 10

DISK_HINTS = {
    **dict.fromkeys((errno.ENOSPC, errno.EDQUOT), "free some space, or choose another --output"),
    **dict.fromkeys((errno.EACCES, errno.EPERM), "choose another --output, or change its permissions"),
    errno.EROFS: "choose another --output",
}
"""The operating system's error → what the user can do about it."""

Result = TypeVar("Result")

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class BuildResult:
    """A published bundle."""

    bundle: str
    bundle_id: str
    precision: str
    nodes: int
    weight_bytes: int
    engine: CompiledEngine | None
    validation: ValidationSummary


def build(config: BuildConfig, progress: Progress = SILENT) -> BuildResult:
    """Build the bundle at `config.output`, and describe it.

    Raises ExportError, and then leaves nothing at the output. A build that was killed or interrupted is continued by
    the next one with the same output.
    """
    with _disk_errors_explained(config):
        check_output(config.output, force=config.force)
        build_log = BuildLog(progress)
        config, model = _load(config, build_log)
        config, target = _resolve(config, model, build_log)
        if config.validate:
            copies = estimates.num_references(config.precision, model.config.layers)
            estimates.check_memory(model, hint=estimates.WITHOUT_WHOLE_STEPS, copies=copies)
            estimates.check_envelope(model, config)
        import torch  # noqa: F401  so that it is found missing before every weight is read

        with Workspace.open(config.output, force=config.force) as workspace:
            try:
                return Build(config, target, model, workspace, build_log).run()
            except (ExportError, OSError):
                workspace.clear()
                raise
            except KeyboardInterrupt:
                if workspace.has_results:
                    log.info("finished stages stay in %s: run the same command to continue", workspace.root)
                raise


@contextmanager
def _disk_errors_explained(config: BuildConfig) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        if error.errno in (None, errno.ENOMEM):
            raise  # raised by a library, not by the operating system; or memory's, not the disk's
        where = error.filename or config.output.parent
        raise UsageError(f"{where}: {error.strerror}", hint=DISK_HINTS.get(error.errno, "")) from error


def _load(config: BuildConfig, build_log: BuildLog) -> tuple[BuildConfig, LoadedModel]:
    """The model, and the configuration with the precision that the model has by default."""
    from nemotrt.exporter.stages.load import load

    with build_log.stage("load", config.checkpoint.resolve().name):
        model = load(config.checkpoint, config.layers, config.ignore_fields)
    check_ignored(model.config, config.ignore_fields)
    for name in model.config.ignored_fields:
        build_log.note(f"{name} of config.json is ignored, as requested (the manifest says so)")
    for name, reason in model.config.inert.items():
        build_log.note(f"{name} has no effect: {reason}", logging.DEBUG)
    if layers := model.config.chosen_layers:
        build_log.note(f"{partial_model(layers)} (the manifest says so)")
    if model.not_exported:
        build_log.note(f"{len(model.not_exported)} tensors (mtp.*) are not exported")
    for note in (*cache_notes(model.config, config.kv_dtype), *end_token_notes(model.end_tokens)):
        build_log.note(note)
    has_fp8_cache, model = model.config.recipe.kv_cache, model.with_cache(config.kv_dtype)
    default = Precision.FP8 if model.config.recipe else Precision.of(model.config.dtype)
    config = dataclasses.replace(config, precision=config.precision or default)
    _check_quantization(config, model, has_fp8_cache=has_fp8_cache)
    check_residual(model.config, config.precision)
    return config, model


def _resolve(config: BuildConfig, model: LoadedModel, build_log: BuildLog) -> tuple[BuildConfig, Target]:
    """Fill in every default that depends on this machine."""
    target = settle(config.runtime, config.sms, config.precision)
    if target.runtime != ONNX:
        target = _supported(target, model, config)
    if config.runtime == AUTO:
        build_log.note(f"runtime: {target.title}" + (f" ({target.why})" if target.why else ""))
    return dataclasses.replace(config, runtime=target.runtime, sms=target.sms), target


def _supported(target: Target, model: LoadedModel, config: BuildConfig) -> Target:
    """The target if its kernels, its TensorRT and this machine's memory allow it, else the graph alone if permitted."""
    from nemotrt.exporter.engines.kernel_coverage import check_supported
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


def _check_quantization(config: BuildConfig, model: LoadedModel, *, has_fp8_cache: bool) -> None:
    """Raise UsageError on a precision that would undo the checkpoint's FP8, and on options without effect."""
    recipe = model.config.recipe
    if recipe and config.precision != Precision.FP8:
        raise UsageError(
            f"the checkpoint is FP8: --precision {config.precision} needs the weights from before quantization",
            hint="use --precision fp8, or the checkpoint that it was quantized from",
        )
    if config.precision == Precision.FP8 and not recipe:
        return
    is_given = {
        "--calibration": config.calibration is not None,
        "--preset": config.preset != PRESETS[0],
        "--exclude": bool(config.exclude),
        "--kv-dtype": config.kv_dtype != "auto" and not (config.kv_dtype == "bf16" and has_fp8_cache),
    }
    for name in filter(is_given.__getitem__, is_given):
        why = "the checkpoint is FP8 already" if recipe else "nothing is quantized"
        raise UsageError(
            f"{name} has no effect: {why}", hint="it needs --precision fp8 and an unquantized model"
        )


def identity(config: BuildConfig, model: LoadedModel) -> list[Any]:
    """Everything that decides the results of a build: tool versions, configuration, the checkpoint's files."""
    paths = {tensor.path for weight in model.weights.values() for tensor in weight.tensors}
    files = [(path.name, path.stat().st_size, path.stat().st_mtime_ns) for path in sorted(paths)]
    options = dataclasses.asdict(config) | {"checkpoint": config.checkpoint.resolve()}
    for name in ("output", "force", "keep_failed", "validate", "allow_zero_weights"):
        del options[name]
    return [environment.tool_versions(), options, dataclasses.asdict(model.config), files]


def describe(gate: Gate) -> str:
    """A gate in one line."""
    return f"{gate.scenario}, {gate.output}: {gate.metric} {gate.value:.3g}, limit {gate.limit:.3g}"


class _NoKernelsError(CompileError):
    """The kernels or the plugin library of an engine cannot be compiled."""


class Build:
    """The stages of one build. A stage that the previous build finished with the same inputs does not run again."""

    def __init__(
        self, config: BuildConfig, target: Target, model: LoadedModel, workspace: Workspace, log: BuildLog
    ) -> None:
        self.config, self.target, self.model, self.workspace, self.log = config, target, model, workspace, log
        self.key = digest(identity(config, model))

    def run(self) -> BuildResult:
        """Run all stages and publish the bundle."""
        self.zeros()
        self.quantize()
        lowered = self.lower()
        graph = OnnxGraph.read(lowered.path)
        engine = self.compile(graph)
        report = self.validate(graph)
        if report and report.failed:
            self._report_failures(report)
        return self.bundle(lowered, graph, engine, report)

    def zeros(self) -> None:
        """Raise CheckpointError on weights that are zero where trained weights are not, unless they are accepted."""
        model, build_log = self.model, self.log
        find = partial(zero_weights.find, model.weights, model.folder, build_log)
        found = self._once("zeros", self.key, ZeroWeights, find)
        accepted = zero_weights.accept(found, build_log.note, allow=self.config.allow_zero_weights)
        self.model = dataclasses.replace(model, zero_weights=accepted)

    def quantize(self) -> None:
        """Quantize the weights to FP8 in the workspace, if the precision asks for it and the checkpoint is not FP8."""
        config = self.config
        if config.precision != Precision.FP8 or self.model.config.recipe:
            return
        from nemotrt.exporter.pipelines.quantize import calibrate_and_quantize
        from nemotrt.exporter.stages.load import load

        folder = self.workspace.folder / QUANTIZED

        def run() -> QuantizedCheckpoint:
            shutil.rmtree(folder, ignore_errors=True)
            folder.mkdir()
            return calibrate_and_quantize(self.model, config, folder, self.log, per_output=True)

        self._once("quantize", self.key, QuantizedCheckpoint, run)
        model = load(folder, config.layers, config.ignore_fields)
        self.model = dataclasses.replace(model, origin=self.model)

    def lower(self) -> LoweredGraph:
        """Write the graph and its weights to the workspace."""
        config, model, path = self.config, self.model, self.workspace.folder / GRAPH

        def run() -> LoweredGraph:
            from nemotrt.exporter.stages.lower import lower
            from nemotrt.exporter.stages.trace import trace

            self._check_disk()
            layers = model.config.layers
            with self.log.stage("trace", f"{len(layers)} layers, {len(set(layers))} kinds"):
                traced = trace(model, config)
            total = estimates.graph_bytes(model, config.precision)
            what = f"{config.precision}, {total / 1e6:.1f} MB of weights"
            done = self.workspace.bytes_done("lower", self.key)
            if done:
                log.info("%.3g GB of weights are reused from the previous build", done / 1e9)
            with self.log.stage("lower", what, total=total, is_bytes=True) as advance:
                graph = lower(
                    model,
                    traced,
                    path,
                    link=config.weights == "link",
                    resume_from=done,
                    advance=advance,
                    synced=partial(self.workspace.record_bytes, "lower", self.key),
                )
            ops = ", ".join(f"{count} {op}" for op, count in graph.ops.items())
            self.log.note(f"{graph.nodes} nodes; {ops}", logging.DEBUG)
            return graph

        # The folder may have moved since the previous build recorded the path.
        return dataclasses.replace(self._once("lower", self.key, LoweredGraph, run), path=path)

    def compile(self, graph: OnnxGraph) -> CompiledEngine | None:
        """Build the engine; None if none was asked for, or if its kernels do not exist and the build may go on."""
        if self.target.runtime == ONNX:
            return None

        def run() -> CompiledEngine:
            from nemotrt.exporter.stages.compile import STEPS, compile, prepare

            try:
                what = f"and plugin library for {self.target.gpus}"
                with self.log.stage("kernels", what, total=STEPS) as advance:
                    library = prepare(self.config, self.target, graph, advance=advance)
            except CompileError as error:
                raise _NoKernelsError(str(error), hint=error.hint) from error
            with self.log.stage("compile", f"engine of {self.target.title}", total=STEPS) as advance:
                folder = self.workspace.folder
                engine = compile(self.config, self.target, graph, library, folder, advance=advance)
            self.log.note(f"{engine.num_plugins} ops are plugins", logging.DEBUG)
            if not engine.pools_seen:
                self.log.note("TensorRT did not list its layers: the engine may copy pools, which is slow")
            return engine

        try:
            key = digest(self.key, dataclasses.asdict(self.target))
            return self._once("compile", key, CompiledEngine, run)
        except _NoKernelsError as error:
            if not self.target.may_fall_back:
                raise
            self.log.note(f"runtime: {ONNX} ({error})")
            return None

    def validate(self, graph: OnnxGraph) -> ValidationReport | None:
        """Compare the graph with PyTorch; None if the user asked for no validation."""
        config, model = self.config, self.model
        if not config.validate:
            self.log.note("not validated: the manifest says so")
            return None

        def run() -> ValidationReport:
            from nemotrt.exporter.pipelines.opened_bundle import ignored_fields
            from nemotrt.exporter.validation.candidates import graph_candidate
            from nemotrt.exporter.validation.plan import plan_validation
            from nemotrt.exporter.validation.stored_weights import expected_weights, with_weights
            from nemotrt.exporter.validation.validate import validate

            fits = estimates.envelope_fits(model, config)
            candidate, plan = graph_candidate(graph), plan_validation(model, config, with_envelope=fits)
            with self.log.stage("validate", "ONNX Runtime against PyTorch", total=len(plan)) as advance:
                report = validate(model, config, candidate, plan, advance=advance)
            report = with_weights(report, graph, expected_weights(model, config), self.log)
            not_compared = (*report.not_compared, *ignored_fields(model.config))
            report = dataclasses.replace(report, not_compared=not_compared)
            self.log.note(f"{len(report.gates) - len(report.failed)} of {len(report.gates)} gates passed")
            return report

        return self._once("validate", self.key, ValidationReport, run)

    def _report_failures(self, report: ValidationReport) -> None:
        failures = list(map(describe, report.failed))
        for failure in failures[:MAX_REPORTED_GATES]:
            self.log.note(f"failed: {failure}")
        if not self.config.keep_failed:
            from nemotrt.exporter.validation.gates import check_finite

            check_finite(report)
            raise ValidationError(
                f"{len(failures)} of {len(report.gates)} gates failed; the first: {failures[0]}",
                hint="--keep-failed writes the bundle anyway, for debugging",
            )

    def bundle(
        self,
        lowered: LoweredGraph,
        graph: OnnxGraph,
        engine: CompiledEngine | None,
        report: ValidationReport | None,
    ) -> BuildResult:
        """Complete the bundle and publish it; raises ValidationError afterwards if a gate failed."""
        from nemotrt.exporter.stages.bundle import bundle

        config, lines = self.config, tuple(self.log.lines)
        with self.log.stage("bundle", str(config.output)):
            manifest = bundle(config, self.model, graph, engine, report, self.workspace.folder, lines)
            self.workspace.publish()
        if report and report.failed:
            raise ValidationError(
                f"{len(report.failed)} gates failed; {config.output} says so",
                hint="do not ship the bundle; nemo-export validate --bisect names the layer, the op and the tensor",
            )
        return BuildResult(
            bundle=str(config.output),
            bundle_id=manifest.bundle_id,
            precision=config.precision,
            nodes=lowered.nodes,
            weight_bytes=lowered.weight_bytes,
            engine=engine,
            validation=manifest.validation,
        )

    def _once(self, stage: str, key: str, kind: type[Result], run: Callable[[], Result]) -> Result:
        """The stage's result: the previous build's if its inputs were the same, else that of a new run."""
        if entry := self.workspace.finished(stage, key):
            log.info("%s is reused from the previous build", stage)
            self.log.lines += entry.log
            return entry.decode(kind)
        num_lines = len(self.log.lines)
        result = run()
        environment.give_back_memory()  # the next stage needs it
        self.workspace.record(stage, key, result, self.log.lines[num_lines:])
        return result

    def _check_disk(self) -> None:
        """Raise UsageError if the bundle does not fit on the output's disk."""
        config, model, folder = self.config, self.model, Path(self.config.output.parent)
        sources = stored_parameters(model.config, model.weights, config.dtype)
        placed = data_layout.lay_out(sources, link=config.weights == "link")
        needed = data_layout.allocated_bytes(tensor for tensor in placed if tensor.linked is None)
        if config.runtime != ONNX:
            needed += estimates.graph_bytes(model, config.precision)  # an engine holds the weights once more
        free = shutil.disk_usage(folder).free
        if needed > free:
            raise UsageError(
                f"{folder} has {free / 1e9:.3g} GB free, the bundle needs {needed / 1e9:.3g} GB",
                hint=DISK_HINTS[errno.ENOSPC],
            )
