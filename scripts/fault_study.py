#!/usr/bin/env python3
"""Injects 19 faults into a right graph and says which gates catch each, and whether clean seeds raise an alarm.

The table of docs/validation.md; a fault that no gate catches, or an alarm on a clean graph, ends with status 1.
"""

from __future__ import annotations

import shutil
import sys
import tempfile
from collections import Counter
from pathlib import Path

import click

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "tests"))

from faults import FAULTS, broken  # noqa: E402  (tests/ is no package)

from nemotrt.exporter.artifacts import LoadedModel, ValidationReport  # noqa: E402
from nemotrt.exporter.config import BuildConfig  # noqa: E402
from nemotrt.exporter.gates import ALONE  # noqa: E402
from nemotrt.exporter.stages.load import load  # noqa: E402
from nemotrt.exporter.stages.lower import lower  # noqa: E402
from nemotrt.exporter.stages.trace import trace  # noqa: E402
from nemotrt.exporter.stages.validate import validate  # noqa: E402


def caught_by(report: ValidationReport) -> Counter[str]:
    """Failed gates by metric, those of layers alone under that name."""
    failed = [gate for gate in report.gates if not gate.passed]
    return Counter(ALONE if gate.scenario == ALONE else gate.metric for gate in failed)


def study(model: LoadedModel, precision: str, seeds: int) -> int:
    """Print a row for each fault and one for the clean seeds; gives how many went wrong."""
    wrong = 0
    with tempfile.TemporaryDirectory() as folder:
        right = Path(folder) / "right"
        right.mkdir()
        config = BuildConfig(model.folder, right, precision=precision)
        lower(model, trace(model, config), right / "model.onnx")
        for name, fault in FAULTS.items():
            copy = shutil.copytree(right, Path(folder) / "broken")
            broken(copy / "model.onnx", fault)
            found = caught_by(validate(model, config, copy / "model.onnx"))
            shutil.rmtree(copy)
            wrong += not found
            said = ", ".join(f"{metric} ({count})" for metric, count in found.most_common()) or "MISSED"
            print(f"| {name} | {precision} | {said} |", flush=True)
        alarms = {}
        for seed in range(seeds):
            found = caught_by(validate(model, config, right / "model.onnx", seed=seed))
            alarms |= {seed: found} if found else {}
        wrong += len(alarms)
        print(f"| none, {seeds} seeds | {precision} | {alarms or 'no alarm'} |", flush=True)
    return wrong


@click.command()
@click.argument("checkpoint", type=click.Path(exists=True, path_type=Path))
@click.option("--precision", "precisions", multiple=True, default=("fp16", "bf16"))
@click.option("--seeds", default=20, show_default=True)
def main(checkpoint: Path, precisions: tuple[str, ...], seeds: int) -> None:
    """Study the faults on CHECKPOINT."""
    model = load(checkpoint)
    print("| fault | precision | caught by (gates) |\n|---|---|---|")
    sys.exit(bool(sum(study(model, precision, seeds) for precision in precisions)))


if __name__ == "__main__":
    main()
