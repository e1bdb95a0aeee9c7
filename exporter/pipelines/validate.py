"""Validates a bundle against PyTorch, a reference file or another bundle."""

import dataclasses
import logging
from pathlib import Path

from nemotrt.exporter.artifacts import TracedModel
from nemotrt.exporter.checkpoint.loaded_model import LoadedModel
from nemotrt.exporter.config import DRIFT_STEPS, PRECISIONS, BuildConfig
from nemotrt.exporter.errors import UsageError
from nemotrt.exporter.pipelines import estimates
from nemotrt.exporter.pipelines.opened_bundle import OpenedBundle, open_bundle
from nemotrt.exporter.progress import SILENT, Advance, Progress
from nemotrt.exporter.quantization.text import MAX_TOKENS, Sequences, sequences
from nemotrt.exporter.report.model import NotCompared, Omitted, ValidationReport
from nemotrt.exporter.runtime import manifest as manifests
from nemotrt.exporter.runtime.manifest import Manifest
from nemotrt.exporter.validation.candidates import candidate_of
from nemotrt.exporter.validation.comparison import (
    Candidate,
    ReferenceRun,
    compare,
    force_routing,
    observe_greedy,
)
from nemotrt.exporter.validation.envelope import Envelope, driven
from nemotrt.exporter.validation.gates import ExpectedDtypes, expected_dtypes
from nemotrt.exporter.validation.plan import NUM_MODES, Workload, parts_of, plan_validation, workload_of
from nemotrt.exporter.validation.references import reference_file
from nemotrt.exporter.validation.request import ValidationRequest
from nemotrt.exporter.validation.routing import router_policies
from nemotrt.exporter.validation.runners.base import PartSession

log = logging.getLogger(__name__)

ABSENT = (
    NotCompared(
        Omitted.PYTORCH, "the reference is another bundle; its own report says whether that is right"
    ),
    NotCompared(Omitted.PARTS, "two bundles are compared in whole steps"),
    NotCompared(Omitted.DRIFT, "two bundles are compared in whole steps"),
)

SAME = {
    "config_sha256": "is a bundle of another model: its config.json differs",
    "page_size": "has pages of {theirs} tokens, {bundle} of {ours}",
    "layers": "has layers {theirs}, {bundle} {ours}",
}
"""The facts that two bundles must share → the error if they differ."""


def revalidate(request: ValidationRequest, progress: Progress = SILENT) -> ValidationReport:
    """Compare a bundle with its reference; the report lists every gate, and what was not compared.

    With a text, the report has the quality loss of quantization, measured against `base`, or against the checkpoint if
    the build quantized it. Raises BundleError on a damaged bundle, UsageError on a reference of another bundle.
    """
    if request.golden:
        return _by_reference_file(request, request.golden, progress)
    if request.against:
        return _by_other_bundle(request, request.against, progress)
    return _by_pytorch(request, progress)


def _by_reference_file(request: ValidationRequest, golden: Path, progress: Progress) -> ValidationReport:
    bundle = request.bundle
    with progress.stage("load", f"{bundle}, {golden.name}"):
        manifest = manifests.verify(bundle, deep=False)
        candidate = candidate_of(bundle, manifest, request)
        run = reference_file.read(golden, bundle, manifest)
    total = NUM_MODES * run.workload.num_steps
    with progress.stage("validate", f"{candidate.title} against {golden.name}", total=total) as advance:
        report = compare(run, candidate, force_routing(run, candidate), advance)
    return _with_limits(report, run, manifest)


def _with_limits(report: ValidationReport, run: ReferenceRun, manifest: Manifest) -> ValidationReport:
    """The report with the limits of the bundle, and how far the recorded steps went in them."""
    steps = [step for steps in run.scenarios.values() for step in steps]
    return dataclasses.replace(report, envelope=driven(Envelope.of(manifest.profiles[0]), steps))


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
    if checkpoint:
        report = _with_weights(report, subject, progress)
    return _with_text(report, subject, tokens, text.name, progress) if text else report


def _of_steps(
    request: ValidationRequest, subject: OpenedBundle, candidate: Candidate, progress: Progress
) -> ValidationReport:
    model, config, golden = subject.model, subject.config, request.save_golden
    copies = estimates.num_references(config.precision, model.config.layers)
    hint = "--layers-alone compares with one layer in memory at a time"
    estimates.check_memory(model, hint=hint, copies=copies)
    estimates.check_envelope(model, config)
    from nemotrt.exporter.validation.validate import validate

    def save(run: ReferenceRun) -> None:
        if golden:
            run = dataclasses.replace(run, not_compared=(*run.not_compared, *subject.not_compared))
            reference_file.save(golden, run, reference_file.identity_of(subject.manifest))
            log.info("reference file: %s, %.1f MB", golden, golden.stat().st_size / 1e6)

    steps = DRIFT_STEPS if request.drift_steps is None else request.drift_steps
    with_parts = candidate.graph is not None
    plan = plan_validation(
        model,
        config,
        seed=request.seed or 0,
        drift_steps=steps,
        with_parts=with_parts,
        with_envelope=estimates.envelope_fits(model, config),
    )
    with progress.stage("validate", f"{candidate.title} against PyTorch", total=len(plan)) as advance:
        return validate(model, config, candidate, plan, advance=advance, recorded=save)


def _of_layers(request: ValidationRequest, subject: OpenedBundle, progress: Progress) -> ValidationReport:
    model, config = subject.model, subject.config
    estimates.check_part_memory(model, config.precision)
    estimates.check_envelope(model, config)
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


def _with_weights(report: ValidationReport, subject: OpenedBundle, progress: Progress) -> ValidationReport:
    """The report with the bundle's weights compared with those of the checkpoint, bit for bit."""
    from nemotrt.exporter.validation.stored_weights import expected_weights, with_weights

    base = subject.base if subject.has_own_weights else None
    return with_weights(
        report, subject.graph, expected_weights(subject.model, subject.config, base), progress
    )


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


def _by_other_bundle(request: ValidationRequest, other: Path, progress: Progress) -> ValidationReport:
    """The report of a bundle compared with another one, each run as its engine or its graph.

    Both differ from PyTorch in FP32, the reference by up to three times the rounding baseline of its precision. So this
    answers only whether the two agree; PyTorch or a reference file says whether either is right. The limits are those
    of the coarser precision of the two: three times the rounding baseline of PyTorch at it, on the weights of the finer
    bundle (the reference's if the precision is the same), so that the baseline never contains a difference of weights.
    Raises UsageError if they are not bundles of one model, or are not quantized alike.
    """
    with progress.stage("load", f"{request.bundle}, {other}"):
        bundle, reference = open_bundle(request.bundle), open_bundle(other)
        _check_same_model(bundle, reference)
        candidate, recorded = (
            candidate_of(opened.folder, opened.manifest, request, opened.graph)
            for opened in (bundle, reference)
        )
    # The sort is stable: of two equal precisions, the reference counts as the finer.
    finer, coarser = sorted((reference, bundle), key=lambda x: PRECISIONS.index(x.config.precision))
    states = (bundle.config.state_dtype, reference.config.state_dtype)
    limiting = dataclasses.replace(coarser.config, state_dtype=max(states, key=PRECISIONS.index))
    estimates.check_memory(finer.model, hint="use a machine with more")
    workload = workload_of(reference.model, reference.config, request.seed or 0)
    num_pytorch = 0 if limiting.precision == "fp32" else 2  # the reference and the baseline
    total = (1 + num_pytorch + NUM_MODES) * workload.num_steps
    title = f"{candidate.title} against {other.name}"
    if num_pytorch:
        import torch  # noqa: F401  so that it is found missing before anything runs
    with progress.stage("validate", title, total=total) as advance:
        dtypes = expected_dtypes(bundle.model, bundle.config)
        run = _observe_reference(reference, recorded, workload, dtypes, advance)
        if limiting.precision != "fp32":
            run = _with_baselines(run, finer, limiting, advance)
        report = compare(run, candidate, force_routing(run, candidate), advance)
    return _with_limits(report, run, bundle.manifest)


def _check_same_model(bundle: OpenedBundle, reference: OpenedBundle) -> None:
    """Raise UsageError unless both are bundles of the same model and quantized alike."""
    ours, theirs = reference_file.identity_of(bundle.manifest), reference_file.identity_of(reference.manifest)
    for field, message in SAME.items():
        values = getattr(ours, field), getattr(theirs, field)
        if values[0] != values[1]:
            our, their = (
                ", ".join(map(str, v)) if isinstance(v, tuple) and v else v or "all" for v in values
            )
            raise UsageError(
                f"{reference.folder} {message.format(bundle=bundle.folder, ours=our, theirs=their)}",
                hint="compare bundles of one checkpoint, built with the same --page-size and --layers",
            )
    if bundle.model.config.recipe != reference.model.config.recipe:
        raise UsageError(
            f"{bundle.folder} and {reference.folder} are not quantized alike: they differ by the loss of quantization",
            hint="measure that on text: nemo-export validate BUNDLE --eval FILE --base CHECKPOINT",
        )


def _observe_reference(
    reference: OpenedBundle, recorded: Candidate, workload: Workload, dtypes: ExpectedDtypes, advance: Advance
) -> ReferenceRun:
    """The reference bundle's run on its own greedy continuation."""
    noise = workload.noises(reference.model.pools(reference.config))
    runner = recorded.open(workload.sizes, recorded.modes[1])
    scenarios, observations = observe_greedy(runner, workload, noise, advance)
    return ReferenceRun(
        reference=f"{reference.folder.resolve().name}, {recorded.title} ({runner.runs_as})",
        workload=workload,
        scenarios=scenarios,
        noise=noise,
        observations=observations,
        policies=router_policies(reference.model),
        dtypes=dtypes,
        not_compared=ABSENT,
    )


def _with_baselines(
    run: ReferenceRun, finer: OpenedBundle, limiting: BuildConfig, advance: Advance
) -> ReferenceRun:
    """The run with the rounding baselines of PyTorch at the limiting precision, on the finer bundle's weights."""
    from nemotrt.exporter.validation.references.pytorch import LoadedReference, with_baselines_of

    run = with_baselines_of(run, LoadedReference(finer.model, limiting), advance)
    weights = finer.manifest.model.precision
    return dataclasses.replace(
        run, baseline=f"{run.baseline} against FP32, on the {weights} bundle's weights"
    )
