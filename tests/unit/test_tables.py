"""The tables of a report, as a terminal of 100 columns shows them."""

from __future__ import annotations

from dataclasses import replace

import pytest
from sample_reports import diverging, sample_report

from nemotrt.exporter.commands import tables


def test_a_report_ends_with_its_verdict_and_what_was_not_compared(capsys: pytest.CaptureFixture[str]) -> None:
    tables.show(tables.report(sample_report()))
    lines = capsys.readouterr().out.splitlines()
    assert max(map(len, lines)) <= tables.WIDTH
    worst = next(line for line in lines if "mean KL" in line)
    assert worst.split() == ["decode", "mean", "KL", "1", "2.5", "1", "logits", "1", "failed"]
    assert any(line.startswith("failed: 132 of 133 gates passed") for line in lines)
    assert "rounding baseline: PyTorch (BF16)" in lines
    assert lines[-1] == "not compared: TensorRT engine: not executed"


def test_a_bisection_names_the_layer_the_node_and_the_tensor(capsys: pytest.CaptureFixture[str]) -> None:
    tables.show(tables.report(replace(sample_report(), bisect=diverging())))
    rows = [" ".join(line.split()) for line in capsys.readouterr().out.splitlines()]
    start = rows.index("layer layers.3, mlp")
    assert rows[start : start + 6] == [
        "layer layers.3, mlp",
        "node layers.3.mixer.up_proj, Gemm",
        "tensor layers.3.mixer.up_proj [T, 64]",
        "relative L2 not finite, limit 0.003, rounding baseline 0.001",
        "largest difference not finite instead of 0.5 (step 0, [1, 2])",
        "inputs weight: equal",
    ]
