"""Validate: the graph against PyTorch on identical tokens and carried state, judged by gates that can fail.

How the two are driven and judged stands in `comparison.py`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator

from nemotrt.exporter.checkpoint.layer_selection import partial_model
from nemotrt.exporter.checkpoint.loaded_model import LoadedModel
from nemotrt.exporter.checkpoint.quant_config import cache_notes
from nemotrt.exporter.config import BUILD_DRIFT_STEPS, DRIFT_STEPS, BuildConfig
from nemotrt.exporter.progress import Advance, ignore
from nemotrt.exporter.report.model import Drift, Metric, NotCompared, Omitted, ValidationReport
from nemotrt.exporter.runtime.graph_file import OnnxGraph
from nemotrt.exporter.validation import drift
from nemotrt.exporter.validation.candidates import ENGINE, graph_candidate
from nemotrt.exporter.validation.comparison import WATCHED, Candidate, Extent, Recording, compare
from nemotrt.exporter.validation.graph_dtypes import dtype_gates, expected_dtypes
from nemotrt.exporter.validation.parts.layerwise import compare_parts
from nemotrt.exporter.validation.references.pytorch import Follower, record

PROMPT, DECODE = 96, 64
"""Tokens of the prompt, and tokens decoded after it."""

NO_TEXT = NotCompared(Omitted.TEXT, "none was given (nemo-export validate --eval FILE, or default)")
NO_COST = NotCompared(Omitted.QUANTIZATION_COST, "no text was given (nemo-export validate --eval FILE)")


def validate(
    model: LoadedModel,
    config: BuildConfig,
    graph: OnnxGraph,
    *,
    seed: int = 0,
    drift_steps: int = BUILD_DRIFT_STEPS,
    advance: Advance = ignore,
) -> ValidationReport:
    """The report of every gate on the graph in ONNX Runtime; as `judge`."""
    candidate = graph_candidate(graph)
    return judge(model, config, candidate, seed=seed, drift_steps=drift_steps, advance=advance)


def judge(
    model: LoadedModel,
    config: BuildConfig,
    candidate: Candidate,
    *,
    seed: int = 0,
    drift_steps: int = BUILD_DRIFT_STEPS,
    advance: Advance = ignore,
    recorded: Callable[[Recording], None] = lambda _: None,
) -> ValidationReport:
    """The report of every gate; raises ValidationError when an output that should be compared is missing.

    `drift_steps` may be none. `advance` hears of the steps that were run, `num_steps` in all; `recorded` of the
    reference, before the candidate is run.
    """
    recording = record(model, config, extent(model, config, seed), _left_out(model, config), advance)
    recorded(recording)
    beside = Follower(model, model.pools(config), recording).beside
    report = compare(recording, candidate, beside, advance)
    drifted = _drift(model, config, candidate, drift_steps, seed, advance)
    report = dataclasses.replace(
        report,
        gates=(*report.gates, *(drift.gates(drifted) if drifted else ())),
        drift=drifted,
        not_compared=(*report.not_compared, *_not_drifted(drift_steps, drifted)),
    )
    if not candidate.graph:
        return report
    parts = compare_parts(model, config, candidate.graph, recording.extent, advance=advance)
    return dataclasses.replace(
        report, gates=(*report.gates, *parts.gates), layers=parts.layers, ops=parts.ops
    )


PARTS_ALONE = NotCompared(
    Omitted.MODEL, "its layers ran one at a time (--layers-alone); its logits were not compared"
)


def validate_parts(
    model: LoadedModel,
    config: BuildConfig,
    graph: OnnxGraph,
    *,
    seed: int = 0,
    advance: Advance = ignore,
) -> ValidationReport:
    """The report of each part and each op alone, with no more of the model in memory, and of the graph's dtypes.

    `advance` hears of parts.
    """
    driven, dtype = extent(model, config, seed), config.dtype
    parts = compare_parts(model, config, graph, driven, advance=advance)
    return ValidationReport(
        candidate=f"ONNX Runtime, one part at a time, {parts.runs_as}",
        reference="PyTorch, FP32",
        baseline="" if dtype == "float32" else f"PyTorch, {dtype}",
        tokens={"prompt": driven.prompt, "decode": driven.decode, "seed": seed},
        gates=(*dtype_gates(graph.model, expected_dtypes(model, config)), *parts.gates),
        routing_mismatches={},
        not_compared=(PARTS_ALONE, ENGINE, *_left_out(model, config)),
        layers=parts.layers,
        ops=parts.ops,
        is_whole=False,
    )


def num_parts(num_layers: int) -> int:
    """Parts of a model: its layers, the embeddings and the head."""
    return num_layers + 2


def extent(model: LoadedModel, config: BuildConfig, seed: int) -> Extent:
    """How much a validation drives."""
    return Extent(PROMPT, DECODE, seed, model.config.vocab_size, config.page_size)


def _left_out(model: LoadedModel, config: BuildConfig) -> tuple[NotCompared, ...]:
    chosen = model.config.chosen_layers
    return (
        *(NotCompared(Omitted.TENSORS, name) for name in model.not_exported),
        *((NotCompared(Omitted.MODEL, partial_model(chosen)),) if chosen else ()),
        NO_COST if model.config.recipe else NO_TEXT,
        *(NotCompared(Omitted.KV_RANGE, note) for note in cache_notes(model.config, config.kv_dtype)),
    )


def _drift(
    model: LoadedModel,
    config: BuildConfig,
    candidate: Candidate,
    num_steps: int,
    seed: int,
    advance: Advance,
) -> Drift | None:
    """Over as many steps as a sequence may have tokens, and `num_steps` at most; None of a model without a state."""
    steps = min(num_steps, config.max_context)
    if not steps or "mamba" not in model.config.layers:
        return None
    return drift.measure(
        model,
        config,
        lambda pages: candidate.open(pages, WATCHED),
        num_steps=steps,
        seed=seed,
        advance=advance,
    )


def _not_drifted(num_steps: int, drift: Drift | None) -> Iterator[NotCompared]:
    if drift is None:
        if not num_steps:
            yield NotCompared(Omitted.DRIFT, "no decode steps were requested")
        return
    if drift.steps[-1] < DRIFT_STEPS:
        yield NotCompared(Omitted.DRIFT, f"beyond {drift.steps[-1]} decode steps")
    if all(curve.metric is not Metric.RECURRENCE for curve in drift.curves):
        yield NotCompared(Omitted.RECURRENCES, "their inputs are not visible")


def num_steps(precision: str, num_layers: int, drift_steps: int = BUILD_DRIFT_STEPS) -> int:
    """Steps of a validation: the greedy continuation's, the scenarios' for each runner, each part alone, and drift."""
    num_runners = 3 if precision == "fp32" else 4
    whole = 1 + DECODE + num_runners * Extent(PROMPT, DECODE, 0, 1, PROMPT).num_steps
    return whole + num_parts(num_layers) + drift.num_runs(precision, drift_steps)
