"""What is built, on text: a right graph passes beside the baseline, and a wrong one does not."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from faults import Graph, broken

from nemotrt.exporter.checkpoint.loaded_model import LoadedModel
from nemotrt.exporter.config import BuildConfig
from nemotrt.exporter.quantization.text import BUILT_IN, EVALUATION, built_in, sequences
from nemotrt.exporter.report.model import Metric, TextComparison, TextReport
from nemotrt.exporter.runtime.graph_file import OnnxGraph
from nemotrt.exporter.stages.load import load
from nemotrt.exporter.stages.lower import lower
from nemotrt.exporter.stages.trace import trace
from nemotrt.exporter.validation import text_quality

TINY = Path(__file__).resolve().parents[2] / "examples" / "tiny"
TOKENS = tuple(np.random.default_rng(0).integers(0, 96, (4, 64)))


@pytest.fixture(scope="module")
def loaded(checkpoint: Path) -> LoadedModel:
    return load(checkpoint)


def built(model: LoadedModel, folder: Path, precision: str) -> BuildConfig:
    config = BuildConfig(checkpoint=model.folder, output=folder, precision=precision)
    lower(model, trace(model, config), folder / "model.onnx")
    return config


def failed(report: TextReport) -> set[str]:
    return {gate.metric for gate in text_quality.gates(report) if not gate.passed}


def scaled(graph: Graph) -> None:
    graph.weight("lm_head.weight")[:] *= 1.03


@pytest.mark.parametrize("precision", ["fp32", "fp16", "bf16"])
def test_a_graph_is_judged_on_text(loaded: LoadedModel, tmp_path: Path, precision: str) -> None:
    config = built(loaded, tmp_path, precision)
    heard: list[int] = []
    plan = text_quality.plan_text(loaded, None, config, TOKENS)

    def on_text() -> TextReport:
        graph = OnnxGraph.read(tmp_path / "model.onnx")
        return text_quality.measure(loaded, None, config, graph, plan, "random", advance=heard.append)

    found = on_text()
    assert not failed(found), text_quality.gates(found)
    assert [figure.name for figure in found.comparisons] == (
        ["conversion"] if precision == "fp32" else ["conversion", "baseline"]
    )
    assert not found.layers
    assert sum(heard) == plan.num_sequences == len(TOKENS)
    broken(tmp_path / "model.onnx", scaled)
    assert Metric.MEAN_KL in failed(on_text())


def report(own: TextComparison, baseline: TextComparison) -> TextReport:
    return TextReport("t", 1000, "", (own, replace(baseline, name="baseline")), ())


def test_what_a_short_text_cannot_tell_is_no_alarm() -> None:
    """A baseline that flipped no token may have flipped one, and its perplexity may have come out right by luck."""
    baseline = TextComparison("baseline", 1e-4, 1e-5, 1.0, 0.0, 1.0, 1e-4)
    own = replace(baseline, name="conversion", top1_agreement=0.997, perplexity_ratio=1.0002)
    assert not failed(report(own, baseline))
    assert failed(report(replace(own, top1_agreement=0.996), baseline)) == {Metric.TOP1_DISAGREEMENT}
    assert failed(report(replace(own, perplexity_ratio=0.9996), baseline)) == {Metric.PERPLEXITY_CHANGE}
    assert failed(report(replace(own, mean_kl=3.1e-4), baseline)) == {Metric.MEAN_KL}
    assert failed(report(replace(own, mean_kl=float("nan")), baseline)) == {Metric.MEAN_KL}


def test_nothing_is_calibrated_on_what_is_judged_by_default() -> None:
    held_out = built_in(EVALUATION)
    assert held_out.name == EVALUATION
    calibrated = held_out.with_name(BUILT_IN).read_text(encoding="utf-8")
    paragraphs = [line for line in held_out.read_text(encoding="utf-8").splitlines() if len(line) > 40]
    assert not [line for line in paragraphs if line in calibrated]
    assert sum(map(len, sequences(TINY, held_out, 1))) > 1000
