#!/usr/bin/env python3
"""A long prompt in pieces: how time and memory grow, with attention and without, and whether it stays right.

A figure of docs/performance.md, printed as one JSON object.
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
"""The example's layers without its two of attention."""


@click.command()
@click.option("--tokens", default=32768, show_default=True)
@click.option("--piece", default=512, show_default=True, help="Tokens a step.")
@click.option("--reference/--no-reference", default=True, help="Compare with PyTorch too (minutes).")
def main(tokens: int, piece: int, reference: bool) -> None:
    """A prompt of 32,768 tokens on the example in FP32, in pieces: with its attention, beside PyTorch, and without."""
    with tempfile.TemporaryDirectory() as folder:
        bundles = {"whole": Path(folder) / "whole", "no attention": Path(folder) / "mamba"}
        _build_fp32(bundles["whole"], "")
        _build_fp32(bundles["no attention"], NO_ATTENTION)
        figures: dict[str, Any] = {"tokens": tokens, "piece": piece}
        for name, bundle in reversed(bundles.items()):
            figures[name] = _prompt(bundle / "model.onnx", tokens, piece)
        if reference:
            figures["against PyTorch"] = _against_torch(bundles["whole"] / "model.onnx", tokens, piece)
        report(figures)


def _build_fp32(bundle: Path, layers: str) -> None:
    tool = str(Path(sys.executable).with_name("nemo-export"))
    options = ["--precision", "fp32", "--no-validate", "--runtime", "onnx"]
    options += ["--layers", layers] if layers else []
    subprocess.run([tool, "--quiet", "build", str(EXAMPLE), "--output", str(bundle), *options], check=True)


def _pieces(tokens: int, piece: int, page_size: int) -> list[StepInputs]:
    """The steps of one sequence of random tokens, the last of each wanting logits."""
    ids = np.random.default_rng(0).integers(0, 1024, tokens, dtype=np.int64)
    pages = np.arange(1, -(-tokens // page_size) + 1, dtype=np.int32)[None]
    one = np.ones(1, dtype=np.int32)
    return [
        StepInputs(
            input_ids=ids[done : done + piece],
            query_start=np.asarray([0, len(ids[done : done + piece])], dtype=np.int32),
            context_len=np.asarray([done], dtype=np.int32),
            slot=one,
            page_table=pages,
            logits_row=one * np.int32(len(ids[done : done + piece]) - 1),
        )
        for done in range(0, tokens, piece)
    ]


PAGE = 128
"""Tokens a page."""


def _session(graph: Path, tokens: int) -> Session:
    return Session(graph, num_slots=2, num_pages=1 + -(-tokens // PAGE))


def _prompt(graph: Path, tokens: int, piece: int) -> dict[str, Any]:
    """Seconds and resident memory after each quarter of the prompt."""
    session = _session(graph, tokens)
    steps = _pieces(tokens, piece, PAGE)
    session.step(steps[0])
    times, found = [], {}
    for count, step in enumerate(steps, start=1):
        started = time.perf_counter()
        session.step(step)
        times.append(time.perf_counter() - started)
        if 4 * count % len(steps) == 0:
            quarter = times[-len(steps) // 4 :]
            found[f"{count * piece} tokens"] = {
                "seconds_of_this_quarter": sum(quarter),
                "median_step_ms": 1e3 * statistics.median(quarter),
                "resident_mb": _resident_mb(),
            }
    return found


def _resident_mb() -> float:
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE") / 1e6


def _against_torch(graph: Path, tokens: int, piece: int) -> dict[str, float]:
    """The largest relative L2 of any piece's logits, and of any pool at the end."""
    model = load(EXAMPLE)
    config = BuildConfig(checkpoint=EXAMPLE, output=graph.parent, precision="fp32")
    pools = model.pools(config)
    session, reference = _session(graph, tokens), TorchRunner(model, pools, torch.float32)
    reference.reset({spec.name: session.pool(spec.name) for spec in pools})
    logits = [
        metrics.relative_l2(session.step(step).astype(np.float64), reference.step(step))
        for step in _pieces(tokens, piece, PAGE)
    ]
    held = {
        name: metrics.relative_l2(session.pool(name)[1:].astype(np.float64), values[1:])
        for name, values in reference.pools().items()
    }
    return {"logits": max(logits), "pools": max(held.values())}


if __name__ == "__main__":
    main()
