#!/usr/bin/env python3
"""Measures chunked prefill of a long prompt: time, memory and accuracy, with attention and without.

Prints one JSON object with figures of docs/performance.md.
"""

from __future__ import annotations

import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import click
import numpy as np
import torch
from bench import report

from nemotrt.exporter.config import BuildConfig
from nemotrt.exporter.runtime.session import Session
from nemotrt.exporter.runtime.step import StepInputs
from nemotrt.exporter.stages.load import load
from nemotrt.exporter.validation import metrics
from nemotrt.exporter.validation.runners.torch import TorchRunner

EXAMPLE = Path(__file__).resolve().parents[1] / "examples" / "tiny"
NO_ATTENTION = "0,1,3,4,5,6,8,9"
"""The example's layers except its two attention layers."""


@click.command()
@click.option("--tokens", default=32768, show_default=True)
@click.option("--chunk", default=512, show_default=True, help="Tokens a step.")
@click.option("--reference/--no-reference", default=True, help="Compare with PyTorch too (minutes).")
def main(tokens: int, chunk: int, reference: bool) -> None:
    """Run a long prompt on the example in FP32: with attention, compared with PyTorch, and without attention."""
    with tempfile.TemporaryDirectory() as folder:
        bundles = {"whole": Path(folder) / "whole", "no attention": Path(folder) / "mamba"}
        _build_fp32(bundles["whole"], "")
        _build_fp32(bundles["no attention"], NO_ATTENTION)
        figures: dict[str, Any] = {"tokens": tokens, "chunk": chunk}
        for name, bundle in reversed(bundles.items()):
            figures[name] = _prompt(bundle / "model.onnx", tokens, chunk)
        if reference:
            figures["against PyTorch"] = _against_torch(bundles["whole"] / "model.onnx", tokens, chunk)
        report(figures)


def _build_fp32(bundle: Path, layers: str) -> None:
    tool = str(Path(sys.executable).with_name("nemo-export"))
    options = ["--precision", "fp32", "--no-validate", "--runtime", "onnx"]
    options += ["--layers", layers] if layers else []
    subprocess.run([tool, "--quiet", "build", str(EXAMPLE), "--output", str(bundle), *options], check=True)


def _steps(tokens: int, chunk: int, page_size: int) -> list[StepInputs]:
    """The steps of one sequence of random tokens; each gives the logits of its last token."""
    ids = np.random.default_rng(0).integers(0, 1024, tokens, dtype=np.int64)
    pages = np.arange(1, -(-tokens // page_size) + 1, dtype=np.int32)[None]
    one = np.ones(1, dtype=np.int32)
    return [
        StepInputs(
            input_ids=ids[done : done + chunk],
            query_start=np.asarray([0, len(ids[done : done + chunk])], dtype=np.int32),
            context_len=np.asarray([done], dtype=np.int32),
            slot=one,
            page_table=pages,
            logits_row=one * np.int32(len(ids[done : done + chunk]) - 1),
        )
        for done in range(0, tokens, chunk)
    ]


PAGE = 128
"""Tokens a page."""


def _session(graph: Path, tokens: int) -> Session:
    return Session(graph, num_slots=2, num_pages=1 + -(-tokens // PAGE))


def _prompt(graph: Path, tokens: int, chunk: int) -> dict[str, Any]:
    """Seconds and resident memory after each quarter of the prompt."""
    session = _session(graph, tokens)
    steps = _steps(tokens, chunk, PAGE)
    session.step(steps[0])
    times, figures = [], {}
    for count, step in enumerate(steps, start=1):
        started = time.perf_counter()
        session.step(step)
        times.append(time.perf_counter() - started)
        if 4 * count % len(steps) == 0:
            quarter = times[-len(steps) // 4 :]
            figures[f"{count * chunk} tokens"] = {
                "seconds_of_this_quarter": sum(quarter),
                "median_step_ms": 1e3 * statistics.median(quarter),
                "resident_mb": _resident_mb(),
            }
    return figures


def _resident_mb() -> float:
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE") / 1e6


def _against_torch(graph: Path, tokens: int, chunk: int) -> dict[str, float]:
    """The largest relative L2 error of any chunk's logits, and of any pool at the end."""
    model = load(EXAMPLE)
    config = BuildConfig(checkpoint=EXAMPLE, output=graph.parent, precision="fp32")
    pools = model.pools(config)
    session, reference = _session(graph, tokens), TorchRunner(model, pools, torch.float32)
    reference.reset({spec.name: session.pool(spec.name) for spec in pools})
    logits = [
        metrics.relative_l2(session.step(step).astype(np.float64), reference.step(step))
        for step in _steps(tokens, chunk, PAGE)
    ]
    pool_errors = {
        name: metrics.relative_l2(session.pool(name)[1:].astype(np.float64), reference.pool(name)[1:])
        for name in session.pool_names
    }
    return {"logits": max(logits), "pools": max(pool_errors.values())}


if __name__ == "__main__":
    main()
