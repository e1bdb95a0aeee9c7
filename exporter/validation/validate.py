"""Validates a graph or an engine against PyTorch, on identical tokens and carried state.

`comparison.py` compares whole steps, `drift.py` a long decode, and `parts/` each layer and each op alone.
"""

import dataclasses
from collections.abc import Callable
from functools import partial

from nemotrt.exporter.checkpoint.layer_selection import partial_model
from nemotrt.exporter.checkpoint.loaded_model import LoadedModel
from nemotrt.exporter.checkpoint.quant_config import cache_notes
from nemotrt.exporter.config import DRIFT_STEPS, BuildConfig
from nemotrt.exporter.progress import Advance, ignore
from nemotrt.exporter.report.model import Drift, EnvelopeLimit, Metric, NotCompared, Omitted, ValidationReport
from nemotrt.exporter.runtime.graph_file import OnnxGraph
from nemotrt.exporter.runtime.step import StepInputs
from nemotrt.exporter.validation import drift as drifts
from nemotrt.exporter.validation import envelope as envelopes
from nemotrt.exporter.validation.candidates import ENGINE
from nemotrt.exporter.validation.comparison import Candidate, ReferenceRun, compare
from nemotrt.exporter.validation.drift import DriftComparison
from nemotrt.exporter.validation.envelope import Envelope
from nemotrt.exporter.validation.gates import dtype_gates, expected_dtypes
from nemotrt.exporter.validation.parts.layerwise import compare_parts
from nemotrt.exporter.validation.plan import Plan, plan_validation, workload_of
from nemotrt.exporter.validation.references.pytorch import REFERENCE, LoadedReference, record
from nemotrt.exporter.validation.runners.base import Mode
from nemotrt.exporter.validation.same_program import same_program_gate
from nemotrt.plugins.contract import DType

NO_TEXT = NotCompared(Omitted.TEXT, "none was given (nemo-export validate --eval FILE, or default)")
NO_COST = NotCompared(Omitted.QUANTIZATION_COST, "no text was given (nemo-export validate --eval FILE)")
NO_DRIFT = NotCompared(Omitted.DRIFT, "no decode steps were requested")
PARTS_ALONE = NotCompared(
    Omitted.MODEL, "its layers ran one at a time (--layers-alone); its logits were not compared"
)


def validate(
    model: LoadedModel,
    config: BuildConfig,
    candidate: Candidate,
    plan: Plan | None = None,
    *,
    advance: Advance = ignore,
    recorded: Callable[[ReferenceRun], None] = lambda run: None,
) -> ValidationReport:
    """The report of every gate; raises ValidationError if the candidate lacks an output of the reference.

    Without a `plan`, a build's plan is used. `advance` counts up to the plan's length; `recorded` is called with the
    reference's run before it is compared. At most two copies of the weights are in memory: one in FP32, and one at the
    graph's precision.
    """
    plan = plan or plan_validation(model, config)
    drift = DriftComparison(model, config, plan.drift) if plan.drift else None
    if drift:
        drift.run_candidate(candidate.open(drift.decode.sizes, Mode.WATCHED), advance)
    follow = partial(drift.follow, advance=advance) if drift else lambda _: None
    reference = LoadedReference(model, config)
    run = record(reference, plan.workload, _left_out(model, config), advance=advance, while_loaded=follow)
    recorded(run)
    reference.release()  # The candidate's weights take its place; a routing mismatch loads it again.
    report = compare(run, candidate, reference.align(run), advance)
    if drift:
        report = _with_drift(report, drift.result())
    elif "mamba" in model.config.layers:
        report = dataclasses.replace(report, not_compared=(*report.not_compared, NO_DRIFT))
    whole = [step for steps in run.scenarios.values() for step in steps]
    del reference, run, drift, follow  # What was observed makes room for the parts.
    alone: tuple[StepInputs, ...] = ()
    if candidate.graph:
        gate = same_program_gate(model.config, candidate.graph)
        report = dataclasses.replace(report, gates=(*report.gates, gate))
    if candidate.graph and plan.parts:
        gates, layers, ops = compare_parts(
            model, config, candidate.graph, plan.workload, plan.envelope, advance=advance
        )
        report = dataclasses.replace(report, gates=(*report.gates, *gates), layers=layers, ops=ops)
        alone = plan.envelope.steps(plan.workload.vocab_size, plan.workload.seed)
    return _with_envelope(report, envelopes.driven(plan.envelope, whole, alone))


def validate_parts(
    model: LoadedModel,
    config: BuildConfig,
    graph: OnnxGraph,
    *,
    seed: int = 0,
    advance: Advance = ignore,
) -> ValidationReport:
    """The report of each part and each op alone, and of the graph's dtypes; only one part is in memory at a time."""
    workload, dtype = workload_of(model, config, seed), config.dtype
    envelope = Envelope.of(config)
    gates, layers, ops = compare_parts(model, config, graph, workload, envelope, advance=advance)
    dtypes = dtype_gates(graph.model, expected_dtypes(model, config))
    report = ValidationReport(
        candidate=f"ONNX Runtime, one part at a time ({graph.runs_as()})",
        reference=REFERENCE,
        baseline="" if dtype is DType.FLOAT32 else f"PyTorch ({dtype.label})",
        tokens={"prompt": workload.prompt, "decode": workload.decode, "seed": seed},
        gates=(*dtypes, same_program_gate(model.config, graph), *gates),
        routing_mismatches={},
        not_compared=(PARTS_ALONE, ENGINE, *_left_out(model, config)),
        layers=layers,
        ops=ops,
        is_whole=False,
    )
    alone = envelope.steps(workload.vocab_size, seed)
    return _with_envelope(report, envelopes.driven(envelope, (), alone))


def _with_envelope(report: ValidationReport, limits: tuple[EnvelopeLimit, ...]) -> ValidationReport:
    return dataclasses.replace(report, gates=(*report.gates, *envelopes.gates(limits)), envelope=limits)


def _left_out(model: LoadedModel, config: BuildConfig) -> tuple[NotCompared, ...]:
    chosen = model.config.chosen_layers
    return (
        *(NotCompared(Omitted.TENSORS, name) for name in model.not_exported),
        *((NotCompared(Omitted.MODEL, partial_model(chosen)),) if chosen else ()),
        NO_COST if model.config.recipe else NO_TEXT,
        *(NotCompared(Omitted.KV_RANGE, note) for note in cache_notes(model.config, config.kv_dtype)),
    )


def _with_drift(report: ValidationReport, drift: Drift) -> ValidationReport:
    not_compared = list(report.not_compared)
    if drift.steps[-1] < DRIFT_STEPS:
        not_compared.append(NotCompared(Omitted.DRIFT, f"beyond {drift.steps[-1]} decode steps"))
    if all(curve.metric is not Metric.RECURRENCE for curve in drift.curves):
        not_compared.append(NotCompared(Omitted.RECURRENCES, "their inputs are not visible"))
    gates = (*report.gates, *drifts.gates(drift))
    return dataclasses.replace(report, gates=gates, drift=drift, not_compared=tuple(not_compared))
