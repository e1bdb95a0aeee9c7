#!/usr/bin/env python3
"""Injects every fault of tests/faults.py into a right graph, and says which gates catch it and which a clean one fails.

Writes the tables of docs/validation.md. A fault that no gate catches, or an alarm on a clean graph, ends with status 1.
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

from checkpoints import write_checkpoint  # noqa: E402  (tests/ is no package)
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
from nemotrt.exporter.validation.parts import opwise  # noqa: E402
from nemotrt.exporter.validation.plan import plan_validation  # noqa: E402
from nemotrt.exporter.validation.validate import validate  # noqa: E402

PAGE = ROOT / "docs" / "validation.md"
BEGIN, END = "<!-- written by scripts/fault_study.py -->", "<!-- end of what was written -->"
KEPT = ROOT / "build" / "fault_study"

STUDIES = {
    f"{model} {precision}": (model, precision)
    for model in ("random", "trained")
    for precision in ("fp16", "bf16")
}
FAULT_DRIFT_STEPS = 20
"""Fewer than a build's: what drifts at all has passed its limit by then. Clean seeds run all."""

FLAT_COSINE, FLAT_TOP = f"cosine of the logits ≥ {COSINE}", "same best token ≥ 99%"
FLAT = (FLAT_COSINE, FLAT_TOP)
"""What is often used for a gate, for comparison: the same number for every model."""

SCENARIOS = (ALONE, opwise.ALONE, drift.SCENARIO)
"""Whose gates are counted together, whatever their metric."""

METRICS = {
    ALONE: "layer alone",
    opwise.ALONE: "op alone",
    Metric.RELATIVE_L2: "L2",
    Metric.COSINE: "angle",
    Metric.NORM_RATIO: "norm",
    Metric.NORM_RATIO_ABSOLUTE: "norm, abs.",
    Metric.MEAN_KL: "mean KL",
    Metric.MAX_KL: "max KL",
    Metric.TOP1_MARGIN: "flip",
    Metric.ROUTER_SCORE: "router",
    Metric.OUT_OF_BOUNDS: "stray",
    drift.SCENARIO: "drift",
    Metric.DTYPE: "dtype",
}
"""The metrics that a catch is told by, and a table's heads for them."""


def caught_by(report: ValidationReport) -> dict[str, float]:
    """Each metric that some gate fails by → the largest share of a limit that was used; flat ones: 1."""
    found: dict[str, float] = defaultdict(float)
    for metric, used in _strains(report):
        if used > 1:
            found[metric] = max(found[metric], used)
    return found | dict.fromkeys(_flat(report), 1.0)


def _strains(report: ValidationReport) -> Iterator[tuple[str, float]]:
    for gate in report.gates:
        yield (gate.scenario if gate.scenario in SCENARIOS else gate.metric), gate.limit_fraction


def _flat(report: ValidationReport) -> list[str]:
    angles = [g.value for g in report.gates if g.output == "logits" and g.metric is Metric.COSINE]
    is_caught = {
        FLAT_COSINE: max(angles) > 1 - COSINE,
        FLAT_TOP: min(found.top1_agreement for found in report.next_token) < 0.99,
    }
    return [name for name, caught in is_caught.items() if caught]


def study(model: LoadedModel, config: BuildConfig, folder: Path, seeds: int) -> dict[str, Any]:
    """What catches each fault, and what clean seeds use of the limits; says each on stderr as it is found."""
    right = folder / "right"
    right.mkdir()
    lower(model, trace(model, config), right / "model.onnx")
    plan = plan_validation(model, config, drift_steps=FAULT_DRIFT_STEPS)
    faults = {}
    for fault in FAULTS:
        copy = shutil.copytree(right, folder / "broken")
        broken(copy / "model.onnx", fault.inject)
        candidate = graph_candidate(OnnxGraph.read(copy / "model.onnx"))
        report = validate(model, config, candidate, plan)
        shutil.rmtree(copy)
        faults[fault.name] = caught_by(report)
        click.echo(f"{fault.name}: {', '.join(faults[fault.name]) or 'MISSED'}", err=True)
    clean = []
    for seed in range(seeds):
        candidate = graph_candidate(OnnxGraph.read(right / "model.onnx"))
        report = validate(model, config, candidate, plan_validation(model, config, seed=seed))
        used: dict[str, float] = defaultdict(float)
        for metric, share in _strains(report):
            used[metric] = max(used[metric], share)
        clean.append({"used": used, "flat": _flat(report)})
        click.echo(f"seed {seed}: {max(used.values()):.2f} of a limit at most", err=True)
    return {"faults": faults, "clean": clean}


def run(name: str, seeds: int) -> None:
    """One study, kept in a file."""
    kind, precision = STUDIES[name]
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        checkpoint = ROOT / "examples" / "tiny" if kind == "trained" else write_checkpoint(folder / "random")
        model = load(checkpoint)
        # Small pages, so that a sequence has several.
        config = BuildConfig(model.folder, folder, precision=precision, page_size=32)
        found = study(model, config, folder, seeds)
    KEPT.mkdir(parents=True, exist_ok=True)
    (KEPT / f"{name}.json").write_text(json.dumps(found, indent=1), encoding="utf-8")


def tables(found: dict[str, dict[str, Any]]) -> str:
    """Every fault by the metrics that catch it; every metric by what it catches, and what clean seeds use of it."""
    lines = [
        "| fault | " + " | ".join(METRICS.values()) + " | caught |",
        "|---|" + "---|" * (len(METRICS) + 1),
    ]
    for fault in FAULTS:
        marks = [
            "".join("●" if metric in s["faults"][fault.name] else "○" for s in found.values())
            for metric in METRICS
        ]
        caught = sum(bool(_ours(s["faults"][fault.name])) for s in found.values())
        lines.append(f"| {fault.name} | " + " | ".join(marks) + f" | {caught} of {len(found)} |")
    lines += [
        "",
        "| gate | " + " | ".join(found) + " | alarms | clean seeds use |",
        "|---|" + "---|" * (len(found) + 2),
    ]
    lines += [_share(metric, found) for metric in (*METRICS, *FLAT)]
    caught = [str(sum(bool(_ours(by)) for by in s["faults"].values())) for s in found.values()]
    alarms = [bool(max(seed["used"].values()) > 1) for s in found.values() for seed in s["clean"]]
    lines.append(
        "| **all of ours** | "
        + " | ".join(f"**{n}**" for n in caught)
        + f" | **{sum(alarms)} of {len(alarms)}** | |"
    )
    return "\n".join(lines)


def _ours(caught: dict[str, float]) -> set[str]:
    return set(caught) - set(FLAT)


def _share(metric: str, found: dict[str, dict[str, Any]]) -> str:
    shares = [str(sum(metric in by for by in s["faults"].values())) for s in found.values()]
    seeds = [seed for s in found.values() for seed in s["clean"]]
    used = [seed["used"].get(metric, 0.0) for seed in seeds]
    alarms = (
        sum(metric in seed["flat"] for seed in seeds) if metric in FLAT else sum(share > 1 for share in used)
    )
    said = "" if metric in FLAT else f"{max(used):.0%}"
    return f"| {metric} | " + " | ".join(shares) + f" | {alarms} of {len(seeds)} | {said} |"


@click.command()
@click.argument("names", nargs=-1, type=click.Choice(list(STUDIES)))
@click.option("--seeds", default=20, show_default=True, help="Clean ones, of each study.")
@click.option("--tables", "only_tables", is_flag=True, help="Run nothing: write them of the last runs.")
def main(names: tuple[str, ...], seeds: int, only_tables: bool) -> None:
    """Run the studies NAMES, or all, and write the tables once every study has been run."""
    for name in () if only_tables else names or STUDIES:
        click.echo(f"-- {name}", err=True)
        run(name, seeds)
    missing = [name for name in STUDIES if not (KEPT / f"{name}.json").exists()]
    if missing:
        sys.exit(f"no tables yet: {', '.join(missing)} was not run")
    found = {name: json.loads((KEPT / f"{name}.json").read_text()) for name in STUDIES}
    before, _, rest = PAGE.read_text(encoding="utf-8").partition(BEGIN)
    PAGE.write_text(f"{before}{BEGIN}\n\n{tables(found)}\n\n{END}{rest.partition(END)[2]}", encoding="utf-8")
    is_right = all(
        all(map(_ours, s["faults"].values())) and all(max(seed["used"].values()) <= 1 for seed in s["clean"])
        for s in found.values()
    )
    sys.exit(not is_right)


if __name__ == "__main__":
    main()
