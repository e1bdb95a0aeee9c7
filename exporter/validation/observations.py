"""What a report contains apart from gates: how next-token distributions differ, and how often routing does.

Legend: R rows of logits, V vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import numpy as np

from nemotrt.exporter.report.model import NextToken, RouterAgreement, WorstToken
from nemotrt.exporter.runtime.step import StepInputs
from nemotrt.exporter.validation import metrics, routing
from nemotrt.exporter.validation.gates import Observation, ScenarioErrors
from nemotrt.exporter.validation.metrics import Array
from nemotrt.exporter.validation.routing import RouterPolicy

NUM_WORST, NUM_BEFORE = 5, 24
"""Worst tokens per scenario, and how many tokens before each are reported."""
DIGITS = 4
"""Significant digits of a row's KL."""


def next_token(
    scenario: str,
    steps: Sequence[StepInputs],
    candidate: Observation,
    reference: Observation,
    baseline: ScenarioErrors | None,
) -> NextToken | None:
    """How the distributions of a scenario differ; None if logits are not finite, which a gate reports."""
    ours_RV, reference_RV = candidate.logits_RV, reference.logits_RV
    if not (np.isfinite(ours_RV).all() and np.isfinite(reference_RV).all()):
        return None
    kl = metrics.kl_divergence(ours_RV, reference_RV)
    agreement = float((ours_RV.argmax(1) == reference_RV.argmax(1)).mean())
    margins = metrics.mismatch_margins(ours_RV, reference_RV)
    tie = metrics.TIE * float(np.abs(reference_RV).max())
    if baseline and baseline.kl:
        tie = baseline.max_logit_error
    mismatches = np.flatnonzero(margins > 2 * tie)
    before = _contexts(steps)
    return NextToken(
        scenario=scenario,
        kl=_rounded(kl),
        baseline_kl=_rounded(baseline.kl) if baseline else (),
        mean=float(kl.mean()),
        mean_error=float(kl.std(ddof=1) / math.sqrt(len(kl))) if len(kl) > 1 else 0.0,
        p999=float(np.quantile(kl, 0.999)),
        top1_agreement=agreement,
        top1_agreement_error=math.sqrt(agreement * (1 - agreement) / len(kl)),
        matched=int(mismatches[0]) if len(mismatches) else len(kl),
        worst=tuple(
            WorstToken(
                row=int(row),
                kl=float(kl[row]),
                before=before[row],
                reference=int(reference_RV[row].argmax()),
                candidate=int(ours_RV[row].argmax()),
                margin=float(margins[row]),
            )
            for row in np.argsort(-kl, kind="stable")[:NUM_WORST]
        ),
    )


def _rounded(values: Array | Sequence[float]) -> tuple[float, ...]:
    return tuple(float(f"{value:.{DIGITS}g}") for value in values)


def _contexts(steps: Sequence[StepInputs]) -> list[tuple[int, ...]]:
    """For each row of logits the last tokens of its sequence, the row's own included."""
    history: dict[int, list[int]] = {}
    contexts = []
    for inputs in steps:
        rows: dict[int, tuple[int, ...]] = {}
        for b, slot in enumerate(inputs.slot.tolist()):
            tokens = history.setdefault(slot, [])
            if not inputs.context_len[b] and inputs.query_start[b + 1] > inputs.query_start[b]:
                tokens.clear()
            for t in range(inputs.query_start[b], inputs.query_start[b + 1]):
                tokens.append(int(inputs.input_ids[t]))
                rows[t] = tuple(tokens[-NUM_BEFORE:])
        contexts += [rows[t] for t in inputs.logits_row.tolist()]
    return contexts


def router_agreement(
    policies: Sequence[RouterPolicy],
    reference: Mapping[str, Observation],
    candidate: Mapping[str, Observation],
) -> tuple[RouterAgreement, ...]:
    """Each MoE layer's routing over all scenarios; empty if the candidate does not output router logits."""
    if not policies or not all(any(observation.routers) for observation in candidate.values()):
        return ()
    ours = routing.concatenated([step for name in candidate for step in candidate[name].routers])
    theirs = routing.concatenated([step for name in candidate for step in reference[name].routers])
    agreements = []
    for policy, ours_TE, theirs_TE in zip(policies, ours, theirs, strict=True):
        differs_T, margin_T = policy.differs(ours_TE, theirs_TE), policy.margin(theirs_TE)
        agreements.append(
            RouterAgreement(
                layer=policy.layer,
                tokens=len(differs_T),
                routing_mismatches=int(differs_T.sum()),
                median_margin=float(np.median(margin_T)),
                mismatch_margin=float(margin_T[differs_T].max(initial=0.0)),
                score_error=routing.score_error(ours_TE, theirs_TE),
            )
        )
    return tuple(agreements)
