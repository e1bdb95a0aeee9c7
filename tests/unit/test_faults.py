"""Every fault is caught, by the gate that is for it, and blamed on its own layer; right graphs raise no alarm."""

from __future__ import annotations

import shutil
from collections import defaultdict
from pathlib import Path
from typing import NamedTuple

import pytest
from faults import FAULTS, Fault, broken

from nemotrt.exporter import gates, graph_dtypes
from nemotrt.exporter.artifacts import LoadedModel, ValidationReport
from nemotrt.exporter.config import BuildConfig
from nemotrt.exporter.stages import validate as stage
from nemotrt.exporter.stages.load import load
from nemotrt.exporter.stages.lower import lower
from nemotrt.exporter.stages.trace import trace
from nemotrt.exporter.stages.validate import validate

STATE_IN_FP16, PAGE_MIX_UP = "recurrent state in FP16", "a page mix-up"


class Right(NamedTuple):
    model: LoadedModel
    config: BuildConfig
    graph: Path

    def judged(self, graph: Path, seed: int = 0) -> ValidationReport:
        return validate(self.model, self.config, graph, seed=seed)


@pytest.fixture(scope="module", params=["fp16", "bf16"])
def right(
    request: pytest.FixtureRequest, checkpoint: Path, tmp_path_factory: pytest.TempPathFactory
) -> Right:
    """A right graph of every kind of layer, with pages so small that a sequence has several."""
    model, folder = load(checkpoint), tmp_path_factory.mktemp(request.param)
    config = BuildConfig(model.folder, folder, precision=request.param, page_size=16)
    lower(model, trace(model, config), folder / "model.onnx")
    return Right(model, config, folder / "model.onnx")


@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: fault.name)
def test_a_fault_is_caught_and_blamed_on_its_own_layer(
    right: Right, fault: Fault, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(stage, "DECODE", 4)  # no fault needs more to show
    shutil.copytree(right.graph.parent, tmp_path / "broken")
    broken(tmp_path / "broken" / "model.onnx", fault.inject)
    failed = [gate for gate in right.judged(tmp_path / "broken" / "model.onnx").gates if not gate.passed]
    outputs = defaultdict(set)
    for gate in failed:
        outputs[gate.scenario].add(gate.output.split()[0])
    place = fault.place(right.model.config.numbered_layers)
    if fault.name == STATE_IN_FP16:
        # It hides in the floor: its rounding is that of the activations which the state is made of.
        assert outputs == {graph_dtypes.SCENARIO: {f"ssm_state.{place.removeprefix('layers.')}"}}
    else:
        assert outputs[gates.ALONE] == {place}
        assert "mixed batch" in outputs  # and the whole model shows it too
    if fault.name == PAGE_MIX_UP:
        assert "stray writes" in {gate.metric for gate in failed}


@pytest.mark.parametrize("seed", range(3))
def test_a_right_graph_raises_no_alarm_on_a_short_run(
    right: Right, seed: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(stage, "DECODE", 4)
    assert [gate for gate in right.judged(right.graph, seed).gates if not gate.passed] == []


@pytest.mark.slow
def test_a_right_graph_raises_no_alarm_over_twenty_seeds(right: Right) -> None:
    alarms = [
        (seed, gate)
        for seed in range(20)
        for gate in right.judged(right.graph, seed).gates
        if not gate.passed
    ]
    assert alarms == []
