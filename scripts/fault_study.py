#!/usr/bin/env python3
"""Injects every fault of tests/faults/ into a correct graph and records which gates of a build's validation catch it.

Writes the tables of docs/validation.md. Exits with status 1 if a fault that changes an output is not caught and not
explained here, or if a correct graph fails a gate.
"""

from __future__ import annotations

import json
import shutil
import sys
import tempfile
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import click

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "tests"))

from faults import FAMILIES, FAULTS, broken  # noqa: E402  (tests/ is not a package)
from faults.effect import Effects  # noqa: E402

from nemotrt.exporter.config import BuildConfig  # noqa: E402
from nemotrt.exporter.progress import SILENT  # noqa: E402
from nemotrt.exporter.report.model import Gate, Metric, ValidationReport  # noqa: E402
from nemotrt.exporter.runtime.graph_file import OnnxGraph  # noqa: E402
from nemotrt.exporter.stages.load import load  # noqa: E402
from nemotrt.exporter.stages.lower import lower  # noqa: E402
from nemotrt.exporter.stages.trace import trace  # noqa: E402
from nemotrt.exporter.validation import drift, envelope  # noqa: E402
from nemotrt.exporter.validation.candidates import graph_candidate  # noqa: E402
from nemotrt.exporter.validation.comparison import compare  # noqa: E402
from nemotrt.exporter.validation.gates import ALONE, ALONE_AT_LIMITS, COSINE  # noqa: E402
from nemotrt.exporter.validation.parts import layerwise  # noqa: E402
from nemotrt.exporter.validation.parts.layerwise import compare_parts  # noqa: E402
from nemotrt.exporter.validation.plan import plan_validation  # noqa: E402
from nemotrt.exporter.validation.references.pytorch import LoadedReference, record  # noqa: E402
from nemotrt.exporter.validation.same_program import SAME_PROGRAM, same_program_gate  # noqa: E402
from nemotrt.exporter.validation.stored_weights import WEIGHTS, expected_weights, with_weights  # noqa: E402
from nemotrt.exporter.validation.validate import validate  # noqa: E402

PAGE = ROOT / "docs" / "validation.md"
BEGIN, END = "<!-- written by scripts/fault_study.py -->", "<!-- end of what was written -->"
RESULTS = ROOT / "build" / "fault_study"
CHECKPOINT = ROOT / "examples" / "tiny"
PRECISIONS = ("fp32", "fp16", "bf16")
LIMITS = {"page_size": 64, "max_tokens": 192, "max_sequences": 10, "max_context": 2304}
"""A profile above the numbers beyond which some faults act: 10 slots, 36 pages of a sequence, 2,304 tokens."""

FAULT_DRIFT_STEPS = 20
"""For faults of the recurrence, and fewer than in a build: one that drifts has exceeded its limit by then."""

EXPLAINED: dict[str, str] = {}
"""Fault → why validation does not catch it although it changes an output."""

EXACT = (SAME_PROGRAM, WEIGHTS)
"""Scenarios that compare the graph, not numbers: they would catch almost every fault before a number is looked at."""

FIXED_COSINE, FIXED_TOP1 = f"cosine of the logits ≥ {COSINE}", "top-1 agreement ≥ 99%"
FIXED = (FIXED_COSINE, FIXED_TOP1)
"""Common gates with one fixed limit for every model, for comparison."""

SCENARIOS = (ALONE, ALONE_AT_LIMITS, layerwise.OPS_ALONE, drift.SCENARIO, envelope.SCENARIO, *EXACT)
"""Scenarios whose gates are counted together, whatever their metric; the others are counted by metric."""

KINDS = (
    *SCENARIOS,
    Metric.RELATIVE_L2,
    Metric.COSINE,
    Metric.NORM_RATIO,
    Metric.NORM_RATIO_ABSOLUTE,
    Metric.MEAN_KL,
    Metric.MAX_KL,
    Metric.TOP1_MARGIN,
    Metric.ROUTER_SCORE,
    Metric.NOT_FINITE,
    Metric.OUT_OF_BOUNDS,
    Metric.DTYPE,
)


def _kind(gate: Gate) -> str:
    return gate.scenario if gate.scenario in SCENARIOS else gate.metric


def _used(gates: Sequence[Gate]) -> dict[str, float]:
    """The largest fraction of a limit that each kind of gate used."""
    used: dict[str, float] = defaultdict(float)
    for gate in gates:
        used[_kind(gate)] = max(used[_kind(gate)], gate.limit_fraction)
    return used


def _failed_fixed(report: ValidationReport) -> list[str]:
    angles = [g.value for g in report.gates if g.output == "logits" and g.metric is Metric.COSINE]
    if not angles:  # FP32 has no such gate.
        return []
    is_caught = {
        FIXED_COSINE: max(angles) > 1 - COSINE,
        FIXED_TOP1: min((tokens.top1_agreement for tokens in report.next_token), default=0.0) < 0.99,
    }
    return [name for name, caught in is_caught.items() if caught]


def _described(gate: Gate | None) -> dict[str, Any] | None:
    if gate is None:
        return None
    facts = {"scenario": gate.scenario, "output": gate.output, "metric": gate.metric}
    return facts | {"value": gate.value, "limit": gate.limit, "fraction": gate.limit_fraction}


def _caught(report: ValidationReport) -> dict[str, Any]:
    """The first gate that failed, the first that compares numbers, and the number that is nearest to its limit."""
    failed = [gate for gate in report.gates if not gate.passed]
    numeric = [gate for gate in report.gates if gate.scenario not in EXACT]
    return {
        "first": _described(next(iter(failed), None)),
        "numeric": _described(next((gate for gate in failed if gate in numeric), None)),
        "nearest": _described(max(numeric, key=lambda gate: gate.limit_fraction)),
        "exact": [name for name in EXACT if any(gate.scenario == name for gate in failed)],
        "kinds": sorted({_kind(gate) for gate in failed}),
        "fixed": _failed_fixed(report),
    }


class Study:
    """A correct graph of the example at one precision, and its validation as in a build."""

    def __init__(self, precision: str, folder: Path) -> None:
        self.model = load(CHECKPOINT)
        self.config = BuildConfig(self.model.folder, folder, precision=precision, **LIMITS)
        self.folder, self.correct = folder, folder / "correct"
        self.correct.mkdir()
        lower(self.model, trace(self.model, self.config), self.correct / "model.onnx")
        self._expected = expected_weights(self.model, self.config)
        self._plan = plan_validation(self.model, self.config, drift_steps=0)
        self._reference = LoadedReference(self.model, self.config)
        self._run = record(self._reference, self._plan.workload, ())

    def report(self, graph: Path, **options: int) -> ValidationReport:
        """Every gate of a build."""
        read = OnnxGraph.read(graph)
        plan = plan_validation(self.model, self.config, **options)
        report = validate(self.model, self.config, graph_candidate(read), plan)
        return with_weights(report, read, self._expected, SILENT)

    def report_without_drift(self, graph: Path) -> ValidationReport:
        """Every gate of a build but those of drift; PyTorch's run is the same for every graph, and runs once."""
        read, (workload, envelope) = OnnxGraph.read(graph), (self._plan.workload, self._plan.envelope)
        report = compare(self._run, graph_candidate(read), self._reference.align(self._run))
        parts, _, _ = compare_parts(self.model, self.config, read, workload, envelope)
        gates = (*report.gates, same_program_gate(self.model.config, read), *parts)
        return with_weights(replace(report, gates=gates), read, self._expected, SILENT)

    def faults(self, names: Sequence[str]) -> Iterator[tuple[str, dict[str, Any]]]:
        """What catches each of these faults, and whether it changes an output."""
        effects = Effects(self.model, self.config, self.correct / "model.onnx")
        for fault in FAULTS:
            if fault.name not in names:
                continue
            graph = shutil.copytree(self.correct, self.folder / "broken") / "model.onnx"
            broken(graph, fault.inject)
            if fault in FAMILIES["recurrence"]:
                caught = _caught(self.report(graph, drift_steps=FAULT_DRIFT_STEPS))
            else:
                caught = _caught(self.report_without_drift(graph))
            # A number beyond its limit is a change.
            changes = bool(caught["numeric"]) or effects.largest(graph) > 0
            shutil.rmtree(graph.parent)
            yield fault.name, {"changes": changes} | caught

    def clean(self, seed: int) -> dict[str, Any]:
        """The fraction of limits that a correct graph uses."""
        report = self.report(self.correct / "model.onnx", seed=seed)
        return {"used": _used(report.gates), "fixed": _failed_fixed(report)}


def run(precision: str, seeds: int, names: Sequence[str], *, resume: bool) -> None:
    """Run the study at one precision and store each result; with `resume`, only what the last run has not stored."""
    path = RESULTS / f"{precision}.json"
    RESULTS.mkdir(parents=True, exist_ok=True)
    result: dict[str, Any] = {"faults": {}, "clean": []}
    if path.exists() and (names or resume):
        result = json.loads(path.read_text())
    names = names or [fault.name for fault in FAULTS if not resume or fault.name not in result["faults"]]
    with tempfile.TemporaryDirectory() as folder:
        study = Study(precision, Path(folder))
        for name, caught in study.faults(names):
            result["faults"][name] = caught
            path.write_text(json.dumps(result, indent=1), encoding="utf-8")
            click.echo(f"{precision}, {name}: {_cell(caught)}", err=True)
        for seed in range(len(result["clean"]), seeds):
            used = study.clean(seed)
            result["clean"].append(used)
            path.write_text(json.dumps(result, indent=1), encoding="utf-8")
            click.echo(f"{precision}, seed {seed}: {max(used['used'].values()):.2f} of a limit", err=True)


def is_missed(fault: dict[str, Any]) -> bool:
    """Whether a fault changes an output and no gate of a build fails."""
    return bool(fault["changes"] and not fault["first"])


def _cell(fault: dict[str, Any]) -> str:
    """What catches a fault, in a cell of the table."""
    if not fault["changes"]:
        return "changes nothing"
    exact = "".join({SAME_PROGRAM: "P", WEIGHTS: "W"}[name] for name in fault["exact"])
    gate = fault["numeric"] or fault["nearest"]
    sign = ">" if fault["numeric"] else "≤"
    numbers = f"{gate['scenario']}, {gate['metric']}: {gate['value']:.3g} {sign} {gate['limit']:.3g}"
    words = numbers if fault["numeric"] else f"no number (nearest: {numbers})"
    return f"{words}{f' · **{exact}**' if exact else ''}{' · **MISSED**' if is_missed(fault) else ''}"


def tables(studies: dict[str, dict[str, Any]]) -> str:
    """Two tables: what catches each fault, and how many faults and correct graphs each kind of gate fails."""
    columns = [precision.upper() for precision in studies]
    lines = [f"| fault | {' | '.join(columns)} |", "|---|" + "---|" * len(columns)]
    for family, faults in FAMILIES.items():
        lines.append(f"| *{family}* |{' |' * len(columns)}")
        for fault in faults:
            cells = (_cell(study["faults"][fault.name]) for study in studies.values())
            lines.append(f"| {fault.name} | {' | '.join(cells)} |")
    lines += [
        "",
        f"| gates | {' | '.join(columns)} | false alarms | limit used by correct graphs |",
        "|---|" + "---|" * (len(columns) + 2),
    ]
    lines += [_share(kind, studies) for kind in (*KINDS, *FIXED)]
    lines.append(_total("all that compare numbers", "numeric", studies))
    lines.append(_total("all of a build", "first", studies))
    return "\n".join(lines)


def _share(kind: str, studies: dict[str, dict[str, Any]]) -> str:
    field = "fixed" if kind in FIXED else "kinds"
    counts = [
        str(sum(bool(fault["changes"]) and kind in fault[field] for fault in study["faults"].values()))
        for study in studies.values()
    ]
    seeds = [seed for study in studies.values() for seed in study["clean"]]
    used = [seed["used"].get(kind, 0.0) for seed in seeds]
    alarms = sum(
        kind in seed["fixed"] if kind in FIXED else share > 1 for seed, share in zip(seeds, used, strict=True)
    )
    limit_used = "" if kind in FIXED else f"{max(used):.0%}"
    return f"| {kind} | {' | '.join(counts)} | {alarms} of {len(seeds)} | {limit_used} |"


def _total(name: str, field: str, studies: dict[str, dict[str, Any]]) -> str:
    """How many of the faults that change an output a gate catches."""
    counts = []
    for study in studies.values():
        effective = [fault for fault in study["faults"].values() if fault["changes"]]
        counts.append(f"**{sum(bool(fault[field]) for fault in effective)} of {len(effective)}**")
    seeds = [seed for study in studies.values() for seed in study["clean"]]
    alarms = sum(max(seed["used"].values()) > 1 for seed in seeds)
    return f"| **{name}** | {' | '.join(counts)} | **{alarms} of {len(seeds)}** | |"


@click.command()
@click.argument("precisions", nargs=-1, type=click.Choice(PRECISIONS))
@click.option("--seeds", default=20, show_default=True, help="Correct graphs of each precision.")
@click.option(
    "--fault",
    "names",
    multiple=True,
    help="Run this fault alone, and keep the other results of the last run.",
)
@click.option(
    "--resume", is_flag=True, help="Run only what the last run, which was interrupted, has not stored."
)
@click.option(
    "--tables",
    "only_tables",
    is_flag=True,
    help="Write the tables of the last runs without running anything.",
)
def main(
    precisions: tuple[str, ...], seeds: int, names: tuple[str, ...], resume: bool, only_tables: bool
) -> None:
    """Run the study at PRECISIONS (default: all), and write the tables once each precision has a result."""
    for precision in () if only_tables else precisions or PRECISIONS:
        run(precision, seeds, names, resume=resume)
    missing = [name for name in PRECISIONS if not (RESULTS / f"{name}.json").exists()]
    if missing:
        sys.exit(f"no tables are written before the study ran at {', '.join(missing)}")
    studies = {name: json.loads((RESULTS / f"{name}.json").read_text()) for name in PRECISIONS}
    before, _, rest = PAGE.read_text(encoding="utf-8").partition(BEGIN)
    PAGE.write_text(
        f"{before}{BEGIN}\n\n{tables(studies)}\n\n{END}{rest.partition(END)[2]}", encoding="utf-8"
    )
    missed = {
        name for s in studies.values() for name, fault in s["faults"].items() if is_missed(fault)
    } - set(EXPLAINED)
    alarms = [seed for s in studies.values() for seed in s["clean"] if max(seed["used"].values()) > 1]
    for name in sorted(missed):
        click.echo(f"missed: {name}", err=True)
    sys.exit(bool(missed or alarms))


if __name__ == "__main__":
    main()
