"""Validate: the graph against PyTorch on identical tokens and carried state, judged by gates that can fail.

How the two are driven and judged stands in `comparison.py`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path

from nemotrt.exporter.artifacts import LoadedModel, ValidationReport
from nemotrt.exporter.candidates import graph_candidate
from nemotrt.exporter.comparison import Candidate, Extent, Recording, compare
from nemotrt.exporter.config import BuildConfig
from nemotrt.exporter.layer_selection import partial_model
from nemotrt.exporter.layerwise import compare_parts
from nemotrt.exporter.modelopt import cache_notes
from nemotrt.exporter.torch_reference import Follower, record

PROMPT, DECODE = 96, 64
"""Tokens of the prompt, and tokens decoded after it."""

NO_TEXT = "what quantisation costs: no text was given (nemo-export validate --eval FILE)"


def validate(
    model: LoadedModel,
    config: BuildConfig,
    graph: Path,
    *,
    seed: int = 0,
    advance: Callable[[int], None] = lambda _: None,
) -> ValidationReport:
    """The report of every gate on the graph in ONNX Runtime; as `judge`."""
    return judge(model, config, graph_candidate(graph), seed=seed, advance=advance)


def judge(
    model: LoadedModel,
    config: BuildConfig,
    candidate: Candidate,
    *,
    seed: int = 0,
    advance: Callable[[int], None] = lambda _: None,
    recorded: Callable[[Recording], None] = lambda _: None,
) -> ValidationReport:
    """The report of every gate; raises ValidationError when an output that should be compared is missing.

    `advance` hears of the steps that were run, `num_steps` in all; `recorded` of the reference, before the candidate
    is run.
    """
    recording = record(model, config, extent(model, config, seed), _left_out(model, config), advance)
    recorded(recording)
    beside = Follower(model, model.pools(config), recording).beside
    report = compare(recording, candidate, beside, advance)
    if not candidate.graph:
        return report
    parts = compare_parts(model, config, candidate.graph, recording.extent, advance=advance)
    return dataclasses.replace(
        report, gates=(*report.gates, *parts.gates), layers=parts.layers, ops=parts.ops
    )


def extent(model: LoadedModel, config: BuildConfig, seed: int) -> Extent:
    """How much a validation drives."""
    return Extent(PROMPT, DECODE, seed, model.config.vocab_size, config.page_size)


def _left_out(model: LoadedModel, config: BuildConfig) -> tuple[str, ...]:
    chosen = model.config.chosen_layers
    return (
        *(f"{name}: not exported" for name in model.not_exported),
        *((f"the whole model: {partial_model(chosen)}",) if chosen else ()),
        *((NO_TEXT,) if model.config.recipe else ()),
        *(f"range of keys and values: {note}" for note in cache_notes(model.config, config.kv_dtype)),
    )


def num_steps(precision: str, num_layers: int) -> int:
    """Steps that a validation runs: the greedy continuation's, the scenarios' for each runner, and each part alone."""
    num_runners = 3 if precision == "fp32" else 4
    return 1 + DECODE + num_runners * Extent(PROMPT, DECODE, 0, 1, PROMPT).num_steps + num_layers + 2
