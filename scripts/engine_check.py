"""Builds, runs and validates an engine on this machine's GPU: `python scripts/engine_check.py`, or `make engine-check`.

It checks what only a machine with a GPU can show: that the engine loads, that its steps agree with PyTorch, that
captured and uncaptured steps give the same bits, and how long steps take. It prints a report and writes it as JSON, to
be sent to the maintainers. Without a GPU or TensorRT it reports what is missing and exits with 1.
"""

from __future__ import annotations

import dataclasses
import json
import platform
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click
import numpy as np
from rich.console import Console as RichConsole
from rich.table import Table

from nemotrt.exporter import environment
from nemotrt.exporter.config import PRECISIONS, RUNTIMES, BuildConfig
from nemotrt.exporter.engines.targets import Target, settle
from nemotrt.exporter.errors import CompileError, ExportError, UsageError
from nemotrt.exporter.pipelines import build as pipeline
from nemotrt.exporter.pipelines.validate import revalidate
from nemotrt.exporter.runtime import manifest as manifests
from nemotrt.exporter.runtime.backends import BACKENDS
from nemotrt.exporter.runtime.cuda import CudaError, Gpu, find_gpu
from nemotrt.exporter.runtime.engine_session import EngineSession, engine_profile
from nemotrt.exporter.runtime.manifest import Profile
from nemotrt.exporter.runtime.step import StepInputs, pages_of
from nemotrt.exporter.validation.request import ValidationRequest

EXAMPLE = Path(__file__).resolve().parents[1] / "examples" / "tiny"
WARM_UP, TIMED = 5, 30
"""The number of untimed steps, which include the captured one, and of timed steps."""


@dataclasses.dataclass(frozen=True)
class Outcome:
    """The outcome of one check: its result, or why it failed."""

    check: str
    passed: bool
    detail: str
    data: Any = None


def attempt(name: str, run: Callable[[], tuple[str, Any]]) -> Outcome:
    """Run a check that returns a line of text and its data; an error of this tool makes it fail."""
    try:
        detail, data = run()
    except (ExportError, CudaError) as error:
        return Outcome(name, False, f"{error}" + (f" ({error.hint})" if getattr(error, "hint", "") else ""))
    return Outcome(name, True, detail, data)


def targets(gpu: Gpu, runtime: str, precision: str) -> list[Target]:
    """A target for each TensorRT of this machine that can build for its GPU."""
    usable, refusals = [], []
    for backend in BACKENDS:
        if runtime not in ("auto", backend.runtime):
            continue
        try:
            usable.append(settle(backend.runtime, () if backend.needs_gpu else (gpu.sm,), precision))
        except (CompileError, UsageError) as error:
            refusals.append(f"{error} ({error.hint})")
    if not usable:
        raise CompileError("nothing can be built for this GPU: " + "; ".join(refusals))
    return usable


def build(checkpoint: Path, output: Path, target: Target, precision: str) -> tuple[str, Any]:
    """Build a bundle with the target's engine; the build validates its graph in ONNX Runtime."""
    config = BuildConfig(checkpoint, output, precision, runtime=target.runtime)
    if target.runtime == "tensorrt-rtx":
        config = dataclasses.replace(config, sms=target.sms)
    result = pipeline.build(config)
    assert result.engine is not None
    size = (output / result.engine.path).stat().st_size
    fields = {"engine_bytes": size, **dataclasses.asdict(result.engine)}
    return f"{result.engine.version}, {size / 1e6:.1f} MB", fields


def compare(checkpoint: Path, bundle: Path) -> tuple[str, Any]:
    """Validate the engine against PyTorch, and captured steps against uncaptured ones."""
    manifests.verify(bundle, deep=True)
    report = revalidate(ValidationRequest(bundle, checkpoint, engine=True))
    failed = [gate for gate in report.gates if not gate.passed]
    summary = f"{report.candidate}: {len(report.gates) - len(failed)} of {len(report.gates)} gates passed"
    if failed:
        raise CompileError(f"{summary}; the first that failed: {pipeline.describe(failed[0])}")
    return summary, dataclasses.asdict(report)


def decode_step(profile: Profile, sequences: int, context: int) -> StepInputs:
    """A step of one token for each sequence; every sequence has `context` tokens, its own slot and its own pages."""
    pages = pages_of(context + 1, profile.page_size)
    return StepInputs(
        np.zeros(sequences, dtype=np.int64),
        np.arange(sequences + 1, dtype=np.int32),
        np.full(sequences, context, dtype=np.int32),
        np.arange(1, sequences + 1, dtype=np.int32),
        np.arange(1, sequences * pages + 1, dtype=np.int32).reshape(sequences, pages),
        np.arange(sequences, dtype=np.int32),
    )


def prompt_step(profile: Profile) -> StepInputs:
    """A step whose tokens all belong to one fresh sequence."""
    tokens = min(profile.max_tokens, profile.max_context)
    return StepInputs(
        np.zeros(tokens, dtype=np.int64),
        np.asarray([0, tokens], dtype=np.int32),
        np.zeros(1, dtype=np.int32),
        np.ones(1, dtype=np.int32),
        np.arange(1, pages_of(tokens, profile.page_size) + 1, dtype=np.int32)[None],
        np.asarray([tokens - 1], dtype=np.int32),
    )


def speed(bundle: Path) -> tuple[str, Any]:
    """Milliseconds of a step at the median, host copies included: decoding with and without capture, and a prompt."""
    profile = engine_profile(bundle, manifests.read(bundle))
    context = min(1024, profile.max_context - 1)
    steps = {
        "decode, 1 sequence": decode_step(profile, 1, context),
        f"decode, {profile.max_sequences} sequences": decode_step(profile, profile.max_sequences, context),
        f"prompt of {min(profile.max_tokens, profile.max_context)} tokens": prompt_step(profile),
    }
    found = {}
    for capture in (True, False):
        session = EngineSession(
            bundle,
            num_slots=1 + profile.max_sequences,
            num_pages=1 + profile.max_sequences * pages_of(profile.max_context, profile.page_size),
            capture=capture,
        )
        for name, step in steps.items():
            if name.startswith("prompt") and not capture:
                continue  # never captured
            title = (
                name if name.startswith("prompt") else f"{name}, {'captured' if capture else 'uncaptured'}"
            )
            found[title] = median_milliseconds(session, step)
        del session
    return "; ".join(f"{name}: {ms:.2f} ms" for name, ms in found.items()), found


def median_milliseconds(session: EngineSession, inputs: StepInputs) -> float:
    """The median over TIMED repetitions of a step, after WARM_UP untimed ones."""
    times = []
    for i in range(WARM_UP + TIMED):
        started = time.perf_counter()
        session.step(inputs)
        if i >= WARM_UP:
            times.append(1e3 * (time.perf_counter() - started))
    return statistics.median(times)


def run(checkpoint: Path, precisions: tuple[str, ...], runtime: str, gpu: Gpu) -> list[Outcome]:
    """Every check, for every TensorRT that this machine has and each precision."""
    outcomes = []
    with tempfile.TemporaryDirectory(prefix="engine-check-") as folder:
        for precision in precisions:
            for target in targets(gpu, runtime, precision):
                name, bundle = f"{target.title}, {precision}", Path(folder) / f"{target.runtime}-{precision}"
                outcomes.append(
                    attempt(
                        f"{name}: build", lambda t=target, p=precision, b=bundle: build(checkpoint, b, t, p)
                    )
                )
                if not outcomes[-1].passed:
                    continue
                outcomes.append(attempt(f"{name}: compare", lambda b=bundle: compare(checkpoint, b)))
                outcomes.append(attempt(f"{name}: speed", lambda b=bundle: speed(b)))
    return outcomes


@click.command()
@click.argument("checkpoint", type=click.Path(exists=True, path_type=Path), default=EXAMPLE)
@click.option(
    "--precision", "precisions", multiple=True, type=click.Choice(PRECISIONS), default=("fp16", "bf16")
)
@click.option("--runtime", type=click.Choice([name for name in RUNTIMES if name != "onnx"]), default="auto")
@click.option(
    "--output", type=click.Path(path_type=Path), default=Path("engine-check.json"), show_default=True
)
def main(checkpoint: Path, precisions: tuple[str, ...], runtime: str, output: Path) -> None:
    """Build engines from CHECKPOINT (default: the example) for this machine's GPU, run them, and validate them."""
    console = RichConsole(width=None if sys.stdout.isatty() else 160)
    try:
        gpu = find_gpu()
        outcomes = run(checkpoint, precisions, runtime, gpu)
    except CudaError as error:
        raise click.ClickException(f"this check runs engines, and needs a GPU: {error}") from None
    except ExportError as error:
        raise click.ClickException(f"{error}" + (f"\n  {error.hint}" if error.hint else "")) from None
    machine = {"gpu": dataclasses.asdict(gpu), **environment.machine(), "cpu": platform.processor()}
    report = {
        "schema_version": 1,
        "passed": all(outcome.passed for outcome in outcomes),
        "machine": machine,
        "tools": environment.tool_versions(),
        "checkpoint": checkpoint.name,
        "outcomes": [dataclasses.asdict(outcome) for outcome in outcomes],
    }
    output.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    table = Table(title=f"{gpu.name}, SM {gpu.sm}, CUDA {gpu.driver}", title_justify="left", box=None)
    for column in ("check", "", "found"):
        table.add_column(column, overflow="fold")
    for outcome in outcomes:
        table.add_row(outcome.check, "passed" if outcome.passed else "FAILED", outcome.detail)
    console.print(table)
    console.print(f"{output} has the whole report: please send it with what went wrong, or right.")
    if not report["passed"]:
        raise SystemExit(1)


if __name__ == "__main__":
    main()
