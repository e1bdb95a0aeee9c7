#!/usr/bin/env python3
"""Injects every fault of tests/faults.py into a correct graph and records which gates catch it.

Writes the tables of docs/validation.md. Exits with status 1 if no gate catches a fault or a correct graph fails one.
"""

from __future__ import annotations

import json
import shutil
import sys
import tempfile
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import click

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "tests"))

from checkpoints import write_checkpoint  # noqa: E402  (tests/ is not a package)
from faults import FAULTS, broken  # noqa: E402

from nemotrt.exporter.checkpoint.loaded_model import LoadedModel  # noqa: E402
from nemotrt.exporter.config import BuildConfig  # noqa: E402
from nemotrt.exporter.report.model import Metric, ValidationReport  # noqa: E402
from nemotrt.exporter.runtime.graph_file import OnnxGraph  # noqa: E402
from nemotrt.exporter.stages.load import load  # noqa: E402
from nemotrt.exporter.stages.lower import lower  # noqa: E402
from nemotrt.exporter.stages.trace import trace  # noqa: E402
from nemotrt.exporter.validation import drift  # noqa: E402
from nemotrt.exporter.validation.candidates import graph_candidate  # noqa: E402
from nemotrt.exporter.validation.gates import ALONE, COSINE  # noqa: E402
from nemotrt.exporter.validation.parts import layerwise  # noqa: E402
from nemotrt.exporter.validation.plan import plan_validation  # noqa: E402
from nemotrt.exporter.validation.validate import validate  # noqa: E402

PAGE = ROOT / "docs" / "validation.md"
BEGIN, END = "<!-- written by scripts/fault_study.py -->", "<!-- end of what was written -->"
RESULTS = ROOT / "build" / "fault_study"

STUDIES = {
    f"{model} {precision}": (model, precision)
    for model in ("random", "trained")
    for precision in ("fp16", "bf16")
}
FAULT_DRIFT_STEPS = 20
"""Fewer than in a build: a fault that drifts has exceeded its limit by then. Correct graphs run all steps."""

FIXED_COSINE, FIXED_TOP1 = f"cosine of the logits ≥ {COSINE}", "top-1 agreement ≥ 99%"
FIXED = (FIXED_COSINE, FIXED_TOP1)
"""Common gates with one fixed limit for every model, for comparison."""

SCENARIOS = (ALONE, layerwise.OPS_ALONE, drift.SCENARIO)
"""Scenarios whose gates are counted together, whatever their metric."""

METRICS = {
    ALONE: "layer alone",
    layerwise.OPS_ALONE: "op alone",
    Metric.RELATIVE_L2: "L2",
    Metric.COSINE: "angle",
    Metric.NORM_RATIO: "norm",
    Metric.NORM_RATIO_ABSOLUTE: "norm, abs.",
    Metric.MEAN_KL: "mean KL",
    Metric.MAX_KL: "max KL",
    Metric.TOP1_MARGIN: "top-1",
    Metric.ROUTER_SCORE: "router",
    Metric.OUT_OF_BOUNDS: "writes",
    drift.SCENARIO: "drift",
    Metric.DTYPE: "dtype",
}
"""Metric or scenario that catches faults → heading of its table column."""


def caught_by(report: ValidationReport) -> dict[str, float]:
    """Metric with a failed gate → largest fraction of a limit that was used; 1 for fixed limits."""
    fractions: dict[str, float] = defaultdict(float)
    for metric, fraction in _limit_fractions(report):
        if fraction > 1:
            fractions[metric] = max(fractions[metric], fraction)
    return fractions | dict.fromkeys(_failed_fixed(report), 1.0)


def _limit_fractions(report: ValidationReport) -> Iterator[tuple[str, float]]:
    for gate in report.gates:
        yield (gate.scenario if gate.scenario in SCENARIOS else gate.metric), gate.limit_fraction


def _failed_fixed(report: ValidationReport) -> list[str]:
    angles = [g.value for g in report.gates if g.output == "logits" and g.metric is Metric.COSINE]
    is_caught = {
        FIXED_COSINE: max(angles) > 1 - COSINE,
        FIXED_TOP1: min(tokens.top1_agreement for tokens in report.next_token) < 0.99,
    }
    return [name for name, caught in is_caught.items() if caught]


def study(model: LoadedModel, config: BuildConfig, folder: Path, seeds: int) -> dict[str, Any]:
    """The gates that catch each fault, and the fraction of limits that correct graphs use; reported on stderr."""
    correct = folder / "correct"
    correct.mkdir()
    lower(model, trace(model, config), correct / "model.onnx")
    plan = plan_validation(model, config, drift_steps=FAULT_DRIFT_STEPS)
    faults = {}
    for fault in FAULTS:
        copy = shutil.copytree(correct, folder / "broken")
        broken(copy / "model.onnx", fault.inject)
        candidate = graph_candidate(OnnxGraph.read(copy / "model.onnx"))
        report = validate(model, config, candidate, plan)
        shutil.rmtree(copy)
        faults[fault.name] = caught_by(report)
        click.echo(f"{fault.name}: {', '.join(faults[fault.name]) or 'MISSED'}", err=True)
    clean = []
    for seed in range(seeds):
        candidate = graph_candidate(OnnxGraph.read(correct / "model.onnx"))
        report = validate(model, config, candidate, plan_validation(model, config, seed=seed))
        used: dict[str, float] = defaultdict(float)
        for metric, share in _limit_fractions(report):
            used[metric] = max(used[metric], share)
        clean.append({"used": used, "fixed": _failed_fixed(report)})
        click.echo(f"seed {seed}: {max(used.values()):.2f} of a limit at most", err=True)
    return {"faults": faults, "clean": clean}


def run(name: str, seeds: int) -> None:
    """Run one study and store its result in a file."""
    kind, precision = STUDIES[name]
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        checkpoint = ROOT / "examples" / "tiny" if kind == "trained" else write_checkpoint(folder / "random")
        model = load(checkpoint)
        # Small pages, so that a sequence has several.
        config = BuildConfig(model.folder, folder, precision=precision, page_size=32)
        result = study(model, config, folder, seeds)
    RESULTS.mkdir(parents=True, exist_ok=True)
    (RESULTS / f"{name}.json").write_text(json.dumps(result, indent=1), encoding="utf-8")


def tables(studies: dict[str, dict[str, Any]]) -> str:
    """Two tables: which metrics catch each fault, and how much of each limit correct graphs use."""
    lines = [
        "| fault | " + " | ".join(METRICS.values()) + " | caught |",
        "|---|" + "---|" * (len(METRICS) + 1),
    ]
    for fault in FAULTS:
        marks = [
            "".join("●" if metric in s["faults"][fault.name] else "○" for s in studies.values())
            for metric in METRICS
        ]
        caught = sum(bool(_ours(s["faults"][fault.name])) for s in studies.values())
        lines.append(f"| {fault.name} | " + " | ".join(marks) + f" | {caught} of {len(studies)} |")
    lines += [
        "",
        "| gate | " + " | ".join(studies) + " | false alarms | limit used by correct graphs |",
        "|---|" + "---|" * (len(studies) + 2),
    ]
    lines += [_share(metric, studies) for metric in (*METRICS, *FIXED)]
    caught = [str(sum(bool(_ours(by)) for by in s["faults"].values())) for s in studies.values()]
    alarms = [bool(max(seed["used"].values()) > 1) for s in studies.values() for seed in s["clean"]]
    lines.append(
        "| **all of this project's gates** | "
        + " | ".join(f"**{n}**" for n in caught)
        + f" | **{sum(alarms)} of {len(alarms)}** | |"
    )
    return "\n".join(lines)


def _ours(caught: dict[str, float]) -> set[str]:
    return set(caught) - set(FIXED)


def _share(metric: str, studies: dict[str, dict[str, Any]]) -> str:
    shares = [str(sum(metric in by for by in s["faults"].values())) for s in studies.values()]
    seeds = [seed for s in studies.values() for seed in s["clean"]]
    used = [seed["used"].get(metric, 0.0) for seed in seeds]
    alarms = (
        sum(metric in seed["fixed"] for seed in seeds)
        if metric in FIXED
        else sum(share > 1 for share in used)
    )
    limit_used = "" if metric in FIXED else f"{max(used):.0%}"
    return f"| {metric} | " + " | ".join(shares) + f" | {alarms} of {len(seeds)} | {limit_used} |"


@click.command()
@click.argument("names", nargs=-1, type=click.Choice(list(STUDIES)))
@click.option("--seeds", default=20, show_default=True, help="Correct graphs of each study.")
@click.option(
    "--tables",
    "only_tables",
    is_flag=True,
    help="Write the tables of the last runs without running anything.",
)
def main(names: tuple[str, ...], seeds: int, only_tables: bool) -> None:
    """Run the studies NAMES (default: all), and write the tables once every study has a result."""
    for name in () if only_tables else names or STUDIES:
        click.echo(f"-- {name}", err=True)
        run(name, seeds)
    missing = [name for name in STUDIES if not (RESULTS / f"{name}.json").exists()]
    if missing:
        sys.exit(f"no tables are written before these studies are run: {', '.join(missing)}")
    studies = {name: json.loads((RESULTS / f"{name}.json").read_text()) for name in STUDIES}
    before, _, rest = PAGE.read_text(encoding="utf-8").partition(BEGIN)
    PAGE.write_text(
        f"{before}{BEGIN}\n\n{tables(studies)}\n\n{END}{rest.partition(END)[2]}", encoding="utf-8"
    )
    is_correct = all(
        all(map(_ours, s["faults"].values())) and all(max(seed["used"].values()) <= 1 for seed in s["clean"])
        for s in studies.values()
    )
    sys.exit(not is_correct)


if __name__ == "__main__":
    main()
