"""Compares a bundle with another bundle of the same model, from another exporter or at another precision.

Both differ from PyTorch in FP32, the reference by up to three times the rounding baseline of its precision. So this
answers only whether the two agree; PyTorch or a reference file says whether either is right. The limits are those of
the coarser precision of the two: three times the rounding baseline of PyTorch at it, on the weights of the finer bundle
(the reference's if the precision is the same), so that a difference of weights is never part of the baseline.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from nemotrt.exporter.config import PRECISIONS, BuildConfig
from nemotrt.exporter.errors import UsageError
from nemotrt.exporter.pipelines import estimates
from nemotrt.exporter.pipelines.opened_bundle import OpenedBundle, open_bundle
from nemotrt.exporter.progress import Advance, Progress
from nemotrt.exporter.report.model import NotCompared, Omitted, ValidationReport
from nemotrt.exporter.validation.candidates import candidate_of
from nemotrt.exporter.validation.comparison import (
    Candidate,
    ReferenceRun,
    compare,
    force_routing,
    observe_greedy,
)
from nemotrt.exporter.validation.gates import ExpectedDtypes, expected_dtypes
from nemotrt.exporter.validation.plan import NUM_MODES, Workload, workload_of
from nemotrt.exporter.validation.references.reference_file import identity_of
from nemotrt.exporter.validation.request import ValidationRequest

ABSENT = (
    NotCompared(
        Omitted.PYTORCH, "the reference is another bundle; its own report says whether that is right"
    ),
    NotCompared(Omitted.PARTS, "two bundles are compared in whole steps"),
    NotCompared(Omitted.DRIFT, "two bundles are compared in whole steps"),
)

SAME = {
    "config_sha256": "is of another model: their config.json differ",
    "page_size": "has pages of {theirs} tokens, {bundle} of {ours}",
    "layers": "has layers {theirs}, {bundle} {ours}",
}
"""The facts that two bundles must share → the error if they differ."""


def compare_bundles(request: ValidationRequest, other: Path, progress: Progress) -> ValidationReport:
    """The report of a bundle compared with another one, each run as its engine or its graph.

    Raises UsageError if they are not bundles of one model, or are not quantized alike.
    """
    with progress.stage("load", f"{request.bundle}, {other}"):
        bundle, reference = open_bundle(request.bundle), open_bundle(other)
        _check(bundle, reference)
        candidate, recorded = (
            candidate_of(opened.folder, opened.manifest, request, opened.graph)
            for opened in (bundle, reference)
        )
    # The sort is stable: of two equal precisions, the reference counts as the finer.
    finer, coarser = sorted((reference, bundle), key=lambda x: PRECISIONS.index(x.config.precision))
    states = (bundle.config.state_dtype, reference.config.state_dtype)
    limiting = replace(coarser.config, state_dtype=max(states, key=PRECISIONS.index))
    estimates.check_memory(finer.model, hint="use a machine with more")
    workload = workload_of(reference.model, reference.config, request.seed or 0)
    num_pytorch = 0 if limiting.precision == "fp32" else 2  # the reference and the baseline
    total = (1 + num_pytorch + NUM_MODES) * workload.num_steps
    title = f"{candidate.title} against {other.name}"
    with progress.stage("validate", title, total=total) as advance:
        dtypes = expected_dtypes(bundle.model, bundle.config)
        run = _observe(reference, recorded, workload, dtypes, advance)
        if limiting.precision != "fp32":
            run = _with_baselines(run, finer, limiting, advance)
        return compare(run, candidate, force_routing(run, candidate), advance)


def _check(bundle: OpenedBundle, reference: OpenedBundle) -> None:
    """Raise UsageError unless both are bundles of the same model and quantized alike."""
    ours, theirs = identity_of(bundle.manifest), identity_of(reference.manifest)
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


def _observe(
    reference: OpenedBundle, recorded: Candidate, workload: Workload, dtypes: ExpectedDtypes, advance: Advance
) -> ReferenceRun:
    """The reference bundle's run on its own greedy continuation."""
    from nemotrt.exporter.validation.references.pytorch import router_policies

    noise = workload.noise(reference.model.pools(reference.config))
    runner = recorded.open(workload.num_pages, recorded.modes[1])
    scenarios, observations = observe_greedy(runner, workload, noise, advance)
    return ReferenceRun(
        reference=f"{reference.folder.resolve().name}, {recorded.title}, {runner.runs_as}",
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
    return replace(run, baseline=f"{run.baseline} against FP32, on the {weights} bundle's weights")
