"""State drift: errors that build up in the carried state are found, even if the whole model's baseline hides them."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from faults import Graph, broken
from faults.recurrence import half_state

from nemotrt.exporter.checkpoint.loaded_model import LoadedModel
from nemotrt.exporter.config import BuildConfig
from nemotrt.exporter.progress import Advance, ignore
from nemotrt.exporter.report.model import Drift, Gate, Metric
from nemotrt.exporter.runtime.graph_file import OnnxGraph
from nemotrt.exporter.runtime.strict_json import decode, encode
from nemotrt.exporter.stages.load import load
from nemotrt.exporter.stages.lower import lower
from nemotrt.exporter.stages.trace import trace
from nemotrt.exporter.validation import drift
from nemotrt.exporter.validation.candidates import graph_candidate
from nemotrt.exporter.validation.plan import plan_validation
from nemotrt.exporter.validation.runners.base import Mode
from nemotrt.exporter.validation.runners.torch import TorchRunner

STEPS = 60


@pytest.fixture(scope="module")
def loaded(checkpoint: Path) -> LoadedModel:
    return load(checkpoint)


def built(model: LoadedModel, folder: Path, **options: str) -> BuildConfig:
    folder.mkdir(parents=True)
    config = BuildConfig(checkpoint=model.folder, output=folder, **options)
    lower(model, trace(model, config), folder / "model.onnx")
    return config


def measured(model: LoadedModel, config: BuildConfig, steps: int = STEPS, advance: Advance = ignore) -> Drift:
    plan = plan_validation(model, config, drift_steps=steps, with_parts=False)
    assert plan.drift is not None
    candidate = graph_candidate(OnnxGraph.read(config.output / "model.onnx"))
    comparison = drift.DriftComparison(model, config, plan.drift)
    comparison.run_candidate(candidate.open(plan.drift.sizes, Mode.WATCHED), advance)
    for dtype in plan.dtypes:
        comparison.follow(TorchRunner(model, model.pools(config), dtype.torch), advance)
    return comparison.result()


def failed(found: Drift) -> list[tuple[str, str]]:
    return [(gate.output, gate.metric) for gate in drift.gates(found) if not gate.passed]


def leaking(graph: Graph) -> None:
    """A head forgets a tenth of a percent faster than it should."""
    graph.weight("layers.4.mixer.A")[1] *= 1.001


@pytest.mark.parametrize("precision", ["fp16", "bf16"])
def test_what_a_state_loses_is_found_where_the_floor_hides_it(
    loaded: LoadedModel, tmp_path: Path, precision: str
) -> None:
    config = built(loaded, tmp_path / "right", precision=precision)
    clean = measured(loaded, config)
    assert not failed(clean)
    assert all(max(curve.values) < 1e-5 for curve in clean.curves if curve.metric is Metric.RECURRENCE)
    broken(tmp_path / "right" / "model.onnx", leaking)
    assert failed(measured(loaded, config)) == [("ssm_state.4", Metric.RECURRENCE)]
    broken(tmp_path / "right" / "model.onnx", half_state)
    assert failed(measured(loaded, config)) == [
        ("ssm_state.0", Metric.RECURRENCE),
        ("ssm_state.4", Metric.RECURRENCE),
    ]


def test_a_state_that_is_declared_in_fp16_has_its_own_baseline(loaded: LoadedModel, tmp_path: Path) -> None:
    config = built(loaded, tmp_path / "graph", precision="fp16", state_dtype="fp16")
    found = measured(loaded, config)
    assert not failed(found)
    alone = [curve for curve in found.curves if curve.metric is Metric.RECURRENCE]
    assert alone[0].output == "ssm_state.0"
    assert min(alone[0].baseline[1:]) > 1e-5
    broken(tmp_path / "graph" / "model.onnx", leaking)
    leaked = [curve for curve in measured(loaded, config).curves if curve.metric is Metric.RECURRENCE]
    assert max(leaked[-1].values) > max(alone[-1].values)


def test_fp32_is_held_to_its_limit(loaded: LoadedModel, tmp_path: Path) -> None:
    config = built(loaded, tmp_path / "graph", precision="fp32")
    heard: list[int] = []
    found = measured(loaded, config, advance=heard.append)
    assert not failed(found)
    assert found.steps == (1, 2, 5, 10, 20, 50, 60)
    assert sum(heard) == STEPS + len(found.steps)
    assert {gate.limit for gate in drift.gates(found)} == {1e-4}
    broken(tmp_path / "graph" / "model.onnx", half_state)
    assert ("ssm_state.0", Metric.RELATIVE_L2) in failed(measured(loaded, config))


def made(error: tuple[float, ...], baseline: tuple[float, ...]) -> list[Gate]:
    curve = drift.curve("ssm_state.0", Metric.RELATIVE_L2, error, baseline)
    return drift.gates(Drift((1, 2, 5), 2, (curve,)))


def test_the_mark_nearest_to_its_limit_is_what_a_gate_shows() -> None:
    (gate,) = made((0.2, 0.5, 0.3), (0.1, 0.1, 0.2))
    assert (gate.value, gate.baseline, gate.passed) == (0.5, 0.1, False)
    assert gate.limit == pytest.approx(0.3)


@pytest.mark.parametrize(
    ("error", "baseline", "metric"),
    [
        ((0.1, np.nan, 0.1), (0.1,) * 3, Metric.NOT_FINITE),
        ((0.1,) * 3, (0.1, np.inf, 0.1), Metric.BASELINE_NOT_FINITE),
    ],
)
def test_what_is_not_finite_is_no_pass(
    error: tuple[float, ...], baseline: tuple[float, ...], metric: Metric
) -> None:
    (gate,) = made(error, baseline)
    assert (gate.metric, gate.passed) == (metric, False)


def test_a_drift_is_read_as_it_was_written() -> None:
    found = Drift((1, 2), 2, (drift.curve("ssm_state.0", Metric.RELATIVE_L2, (0.1, 0.2), ()),))
    assert decode(Drift, json.loads(encode(found)), "x") == found
