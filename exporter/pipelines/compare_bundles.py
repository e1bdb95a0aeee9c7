"""Another bundle as the reference: the same model, as another exporter or at another precision built it.

Both differ from PyTorch in FP32, the reference by up to three times the rounding baseline of its precision. So this
answers only whether the two agree; PyTorch or a reference file says whether either is right. The limits are those of
the coarser precision of the two: three times the rounding baseline of PyTorch at it, on the weights of the finer bundle
(the reference's if the precision is the same), so that a difference of weights is never part of the baseline.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

from nemotrt.exporter.config import BuildConfig
from nemotrt.exporter.errors import UsageError
from nemotrt.exporter.pipelines import estimates
from nemotrt.exporter.pipelines.opened_bundle import Subject, subject_of
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
from nemotrt.exporter.validation.graph_dtypes import expected_dtypes
from nemotrt.exporter.validation.plan import NUM_MODES, Workload, workload_of
from nemotrt.exporter.validation.references.reference_file import identity_of
from nemotrt.exporter.validation.request import ValidationRequest

FINEST_FIRST = ("fp32", "fp16", "bf16", "fp8")

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
"""What two bundles must have in common → what is said where they do not."""


@dataclass(frozen=True)
class _Pair:
    """Two bundles of one model."""

    bundle: Subject
    other: Subject

    @property
    def finer(self) -> Subject:
        """The one whose precision is finer; the other bundle where it is the same."""
        ranks = [FINEST_FIRST.index(one.config.precision) for one in (self.bundle, self.other)]
        return self.bundle if ranks[0] < ranks[1] else self.other

    @property
    def coarsest(self) -> BuildConfig:
        """The configuration with the coarser precision of the two, and the coarser state."""
        coarser = self.other if self.finer is self.bundle else self.bundle
        states = [one.config.state_dtype for one in (self.bundle, self.other)]
        return replace(coarser.config, state_dtype=max(states, key=FINEST_FIRST.index))


def judge_against(request: ValidationRequest, other: Path, progress: Progress) -> ValidationReport:
    """The report of a bundle beside another one, each through its engine or its graph.

    Raises UsageError where the two are not of one model, or cannot be compared by any baseline.
    """
    with progress.stage("load", f"{request.bundle}, {other}"):
        pair = _Pair(subject_of(request.bundle, None, None), subject_of(other, None, None))
        _check(pair, request.bundle, other)
        candidate, reference = (
            candidate_of(folder, subject.manifest, request, subject.graph)
            for folder, subject in ((request.bundle, pair.bundle), (other, pair.other))
        )
    estimates.check_memory(pair.finer.model, hint="use a machine with more")
    workload = workload_of(pair.other.model, pair.other.config, request.seed or 0)
    num_pytorch = 0 if pair.coarsest.precision == "fp32" else 2  # The reference and the baseline.
    total = (1 + num_pytorch + NUM_MODES) * workload.num_steps
    title = f"{candidate.title} against {other.name}"
    with progress.stage("validate", title, total=total) as advance:
        run = _record(pair, other.resolve().name, reference, workload, advance)
        return compare(run, candidate, force_routing(run, candidate), advance)


def _check(pair: _Pair, bundle: Path, other: Path) -> None:
    ours, theirs = identity_of(pair.bundle.manifest), identity_of(pair.other.manifest)
    for field, what in SAME.items():
        one, another = getattr(ours, field), getattr(theirs, field)
        if one != another:
            said = [
                ", ".join(map(str, v)) if isinstance(v, tuple) and v else v or "all" for v in (one, another)
            ]
            raise UsageError(
                f"{other} {what.format(bundle=bundle, ours=said[0], theirs=said[1])}",
                hint="compare bundles of one checkpoint, built with the same --page-size and --layers",
            )
    if pair.bundle.model.config.recipe != pair.other.model.config.recipe:
        raise UsageError(
            f"{bundle} and {other} are not quantized alike: what lies between them is what quantization costs",
            hint="that is measured on text: nemo-export validate BUNDLE --eval FILE --base CHECKPOINT",
        )


def _record(
    pair: _Pair, name: str, reference: Candidate, workload: Workload, advance: Advance
) -> ReferenceRun:
    """The other bundle's run on its own greedy continuation, with the rounding baseline of PyTorch."""
    from nemotrt.exporter.validation.references.pytorch import (
        LoadedReference,
        router_policies,
        with_baselines_of,
    )

    noise = workload.noise(pair.other.model.pools(pair.other.config))
    runner = reference.open(workload.num_pages, reference.modes[1])
    scenarios, observations = observe_greedy(runner, workload, noise, advance)
    run = ReferenceRun(
        reference=f"{name}, {reference.title}, {runner.runs_as}",
        workload=workload,
        scenarios=scenarios,
        noise=noise,
        observations=observations,
        policies=router_policies(pair.other.model),
        dtypes=expected_dtypes(pair.bundle.model, pair.bundle.config),
        not_compared=ABSENT,
    )
    del runner
    if pair.coarsest.precision == "fp32":
        return run
    run = with_baselines_of(run, LoadedReference(pair.finer.model, pair.coarsest), advance)
    weights = pair.finer.manifest.model.precision
    return replace(run, baseline=f"{run.baseline} against FP32, on the {weights} bundle's weights")
