"""What a report says beside its gates: how next-token distributions differ, and how often experts do.

Legend: R rows of logits, V vocabulary.
"""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import NDArray

from nemotrt.exporter.report.model import NextToken, RouterAgreement, WorstToken
from nemotrt.exporter.validation import metrics, routing
from nemotrt.exporter.validation.gates import Array, Compared, Measured, Observation
from nemotrt.exporter.validation.routing import Choosing
from nemotrt.exporter.validation.scenarios import Scenario

NUM_WORST, NUM_BEFORE = 5, 24
"""Tokens shown of a scenario, and how many stand before each."""
DIGITS = 4


def next_token(scenario: Scenario, compared: Compared, baseline: Measured | None) -> NextToken | None:
    """How the distributions of a scenario differ; none where a side is not finite, which is a gate's to say."""
    ours, reference = compared.seen.logits_RV, compared.expected.logits_RV
    if not (np.isfinite(ours).all() and np.isfinite(reference).all()):
        return None
    kl = metrics.kl_divergence(ours, reference)
    is_same = ours.argmax(1) == reference.argmax(1)
    share = float(is_same.mean())
    baseline_kl = np.zeros(0)
    tie = metrics.TIE * float(np.abs(reference).max())
    if baseline is not None and baseline.next_token is not None:
        baseline_kl, tie = np.asarray(baseline.next_token.kl), baseline.next_token.largest
    margins = reference.max(1) - np.take_along_axis(reference, ours.argmax(1)[:, None], 1)[:, 0]
    apart = np.flatnonzero(margins > 2 * tie)
    return NextToken(
        scenario=scenario.name,
        kl=_rounded(kl),
        baseline_kl=_rounded(baseline_kl),
        mean=float(kl.mean()),
        mean_error=float(kl.std(ddof=1) / math.sqrt(len(kl))) if len(kl) > 1 else 0.0,
        p999=float(np.quantile(kl, 0.999)),
        top1_agreement=share,
        top1_agreement_error=math.sqrt(share * (1 - share) / len(kl)),
        matched=int(apart[0]) if len(apart) else len(kl),
        worst=_worst(scenario, kl, ours, reference, margins),
    )


def _rounded(values: Array) -> tuple[float, ...]:
    return tuple(float(f"{value:.{DIGITS}g}") for value in values)


def _worst(
    scenario: Scenario, kl: Array, ours: Array, reference: Array, margins: Array
) -> tuple[WorstToken, ...]:
    before = _contexts(scenario)
    return tuple(
        WorstToken(
            row=int(row),
            kl=float(kl[row]),
            before=before[row],
            reference=int(reference[row].argmax()),
            candidate=int(ours[row].argmax()),
            margin=float(margins[row]),
        )
        for row in np.argsort(-kl, kind="stable")[:NUM_WORST]
    )


def _contexts(scenario: Scenario) -> list[tuple[int, ...]]:
    """For each row of logits the last tokens of its sequence, the row's own included."""
    history: dict[int, list[int]] = {}
    found = []
    for inputs in scenario.steps:
        rows: dict[int, tuple[int, ...]] = {}
        for b, slot in enumerate(inputs.slot.tolist()):
            tokens = history.setdefault(slot, [])
            if not inputs.context_len[b] and inputs.query_start[b + 1] > inputs.query_start[b]:
                tokens.clear()
            for t in range(inputs.query_start[b], inputs.query_start[b + 1]):
                tokens.append(int(inputs.input_ids[t]))
                rows[t] = tuple(tokens[-NUM_BEFORE:])
        found += [rows[t] for t in inputs.logits_row.tolist()]
    return found


def router_agreement(
    choosing: tuple[Choosing, ...], expected: dict[str, Observation], seen: dict[str, Observation]
) -> tuple[RouterAgreement, ...]:
    """Each MoE layer's choices over all scenarios; nothing where the candidate does not show them."""
    if not choosing or not all(any(found.routers) for found in seen.values()):
        return ()
    ours = routing.joined([step for found in seen.values() for step in found.routers])
    theirs = routing.joined([step for name in seen for step in expected[name].routers])
    return tuple(_agreement(layer, a, b) for layer, a, b in zip(choosing, ours, theirs, strict=True))


def _agreement(
    layer: Choosing, ours_TE: NDArray[np.float32], reference_TE: NDArray[np.float32]
) -> RouterAgreement:
    differ, margin = layer.differ(ours_TE, reference_TE), layer.margin(reference_TE)
    return RouterAgreement(
        layer=layer.layer,
        tokens=len(differ),
        routing_mismatches=int(differ.sum()),
        median_margin=float(np.median(margin)),
        mismatch_margin=float(margin[differ].max(initial=0.0)),
        score_error=float(np.abs(routing.scores(ours_TE) - routing.scores(reference_TE)).max(initial=0.0)),
    )
