"""Validates a bundle against PyTorch, a reference file or another bundle."""

from __future__ import annotations

import dataclasses
import logging
from pathlib import Path

from nemotrt.exporter.artifacts import TracedModel
from nemotrt.exporter.checkpoint.loaded_model import LoadedModel
from nemotrt.exporter.config import DRIFT_STEPS, BuildConfig
from nemotrt.exporter.errors import UsageError
from nemotrt.exporter.pipelines import estimates
from nemotrt.exporter.pipelines.opened_bundle import OpenedBundle, open_bundle
from nemotrt.exporter.progress import SILENT, Progress
from nemotrt.exporter.quantization.text import MAX_TOKENS, Sequences, sequences
from nemotrt.exporter.report.model import NotCompared, Omitted, ValidationReport
from nemotrt.exporter.runtime import manifest as manifests
from nemotrt.exporter.validation.candidates import candidate_of
from nemotrt.exporter.validation.comparison import Candidate, ReferenceRun, compare, force_routing
from nemotrt.exporter.validation.plan import NUM_MODES, parts_of, plan_validation, workload_of
from nemotrt.exporter.validation.references import reference_file
from nemotrt.exporter.validation.request import ValidationRequest
from nemotrt.exporter.validation.runners.base import PartSession

log = logging.getLogger(__name__)


def revalidate(request: ValidationRequest, progress: Progress = SILENT) -> ValidationReport:
    """Compare a bundle with its reference; the report lists every gate, and what was not compared.

    With a text, the report has the quality loss of quantization, measured against `base`, or against the checkpoint if
    the build quantized it. Raises BundleError on a damaged bundle, UsageError on a reference of another bundle.
    """
    if request.golden:
        return _by_reference_file(request, request.golden, progress)
    if request.against:
        from nemotrt.exporter.pipelines.compare_bundles import compare_bundles

        return compare_bundles(request, request.against, progress)
    return _by_pytorch(request, progress)


def _by_reference_file(request: ValidationRequest, golden: Path, progress: Progress) -> ValidationReport:
    bundle = request.bundle
    with progress.stage("load", f"{bundle}, {golden.name}"):
        manifest = manifests.verify(bundle, deep=False)
        candidate = candidate_of(bundle, manifest, request)
        run = reference_file.read(golden, bundle, manifest)
    total = NUM_MODES * run.workload.num_steps
    with progress.stage("validate", f"{candidate.title} against {golden.name}", total=total) as advance:
        return compare(run, candidate, force_routing(run, candidate), advance)


def _by_pytorch(request: ValidationRequest, progress: Progress) -> ValidationReport:
    bundle, checkpoint, text = request.bundle, request.checkpoint, request.text
    if request.save_golden:
        reference_file.check_path(request.save_golden, bundle)
    with progress.stage("load", str(checkpoint or bundle)):
        subject = open_bundle(bundle, checkpoint, request.base)
        candidate = candidate_of(bundle, subject.manifest, request, subject.graph)
    _check_base(subject, text, request.base)
    tokens = _tokens(subject, bundle, text) if text else ()
    if request.layers_alone:
        report = _of_layers(request, subject, progress)
    else:
        report = _of_steps(request, subject, candidate, progress)
    if request.bisect:
        report = _bisected(report, request, subject, progress)
    report = dataclasses.replace(report, not_compared=(*report.not_compared, *subject.not_compared))
    return _with_text(report, subject, tokens, text.name, progress) if text else report


def _of_steps(
    request: ValidationRequest, subject: OpenedBundle, candidate: Candidate, progress: Progress
) -> ValidationReport:
    model, config, golden = subject.model, subject.config, request.save_golden
    copies = estimates.num_references(config.precision, model.config.layers)
    hint = "--layers-alone compares with one layer in memory at a time"
    estimates.check_memory(model, hint=hint, copies=copies)
    from nemotrt.exporter.validation.validate import validate

    def save(run: ReferenceRun) -> None:
        if golden:
            run = dataclasses.replace(run, not_compared=(*run.not_compared, *subject.not_compared))
            reference_file.save(golden, run, reference_file.identity_of(subject.manifest))
            log.info("reference file: %s, %.1f MB", golden, golden.stat().st_size / 1e6)

    steps = DRIFT_STEPS if request.drift_steps is None else request.drift_steps
    with_parts = candidate.graph is not None
    plan = plan_validation(model, config, seed=request.seed or 0, drift_steps=steps, with_parts=with_parts)
    with progress.stage("validate", f"{candidate.title} against PyTorch", total=len(plan)) as advance:
        return validate(model, config, candidate, plan, advance=advance, recorded=save)


def _of_layers(request: ValidationRequest, subject: OpenedBundle, progress: Progress) -> ValidationReport:
    model, config = subject.model, subject.config
    estimates.check_part_memory(model, config.precision)
    from nemotrt.exporter.validation.validate import validate_parts

    total = len(parts_of(model))
    with progress.stage("validate", "each layer alone, ONNX Runtime against PyTorch", total=total) as advance:
        return validate_parts(model, config, subject.graph, seed=request.seed or 0, advance=advance)


def _bisected(
    report: ValidationReport, request: ValidationRequest, subject: OpenedBundle, progress: Progress
) -> ValidationReport:
    from nemotrt.exporter.validation.parts import bisection
    from nemotrt.exporter.validation.parts.engine_parts import EngineParts
    from nemotrt.exporter.validation.parts.part_run import mixed_steps

    model, config = subject.model, subject.config
    workload = workload_of(model, config, request.seed or 0)
    open_part: bisection.OpenPart = PartSession
    if request.engine:
        open_part = EngineParts(request.bundle, subject.manifest, mixed_steps(workload), workload).open
    total = 1 + len(parts_of(model))  # Tracing, and each part.
    with progress.stage("bisect", "every value inside each layer", total=total) as advance:
        traced, traced_fp32 = trace_for_bisection(model, config)
        advance(1)
        bisected = bisection.bisect(
            model, config, subject.graph, workload, traced, traced_fp32, open_part=open_part, advance=advance
        )
    return dataclasses.replace(report, bisect=bisected)


def trace_for_bisection(model: LoadedModel, config: BuildConfig) -> tuple[TracedModel, TracedModel]:
    """The model traced at the graph's precision and in FP32."""
    from nemotrt.exporter.stages.trace import trace

    traced = trace(model, config)
    if config.precision == "fp32":
        return traced, traced
    return traced, trace(model, dataclasses.replace(config, precision="fp32", state_dtype="fp32"))


def _check_base(subject: OpenedBundle, text: Path | None, base: Path | None) -> None:
    is_quantized = bool(subject.model.config.recipe)
    if base and not is_quantized:
        raise UsageError("--base has no effect: the bundle is not quantized")
    if base and not text:
        raise UsageError("--base has no effect without --eval")
    if text and is_quantized and not subject.base:
        raise UsageError(
            "--eval needs the model before quantization: name it with --base, or with --checkpoint if the build"
            " quantized it"
        )


def _tokens(subject: OpenedBundle, bundle: Path, text: Path) -> Sequences:
    """The text's tokens; raises UsageError before anything is compared."""
    from nemotrt.exporter.validation.text_quality import num_copies

    tokens = sequences(bundle, text, subject.model.config.bos_token_id)
    hint = "--eval runs the model more than once side by side; leave it out"
    estimates.check_memory(subject.model, hint=hint, copies=num_copies(subject.base))
    return tokens


def _with_text(
    report: ValidationReport, subject: OpenedBundle, tokens: Sequences, name: str, progress: Progress
) -> ValidationReport:
    from nemotrt.exporter.validation import text_quality

    model, base, total = subject.model, subject.base, sum(map(len, tokens))
    plan = text_quality.plan_text(model, base, subject.config, tokens)
    with progress.stage("text", f"{total:,} tokens of {name}", total=plan.num_sequences) as advance:
        measured = text_quality.measure(
            model, base, subject.config, subject.graph, plan, name, advance=advance
        )
    answered = (Omitted.TEXT, Omitted.QUANTIZATION_COST)
    not_compared = [entry for entry in report.not_compared if entry.what not in answered]
    if total >= MAX_TOKENS:
        not_compared.append(NotCompared(Omitted.TEXT, f"{name} beyond its first {MAX_TOKENS:,} tokens"))
    return dataclasses.replace(
        report,
        gates=(*report.gates, *text_quality.gates(measured)),
        not_compared=tuple(not_compared),
        text=measured,
    )
