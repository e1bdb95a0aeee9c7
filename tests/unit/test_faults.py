"""A fault of each family is caught, by the gates that are for it, and blamed on its own layer; right graphs pass.

`scripts/fault_study.py` does so for every fault, on the trained example.
"""

from __future__ import annotations

import shutil
from collections import defaultdict
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
from checkpoints import SMALL_LIMITS
from faults import FAMILIES, FAULTS, Fault, Graph, broken
from faults.effect import Effects

from nemotrt.exporter.checkpoint.loaded_model import LoadedModel
from nemotrt.exporter.config import BuildConfig
from nemotrt.exporter.report.model import Gate, Metric
from nemotrt.exporter.runtime.graph_file import OnnxGraph
from nemotrt.exporter.stages.load import load
from nemotrt.exporter.stages.lower import lower
from nemotrt.exporter.stages.trace import trace
from nemotrt.exporter.validation import drift, envelope, gates
from nemotrt.exporter.validation import plan as plans
from nemotrt.exporter.validation.candidates import graph_candidate
from nemotrt.exporter.validation.envelope import Envelope
from nemotrt.exporter.validation.parts import layerwise
from nemotrt.exporter.validation.plan import plan_validation, workload_of
from nemotrt.exporter.validation.same_program import SAME_PROGRAM
from nemotrt.exporter.validation.validate import validate
from nemotrt.plugins.onnx_op import operand
from nemotrt.plugins.selective_scan import SPEC as SCAN

DECODE_STEPS, DRIFT_STEPS = 4, 10
"""No fault needs more to show."""

SCENARIOS = {
    "eps of the gated norm": {gates.ALONE_AT_LIMITS},
    "residual × 1.005": {gates.ALONE_AT_LIMITS},
    "correction bias enters the weights": {gates.ALONE, layerwise.OPS_ALONE, plans.MIXED},
    "KV heads swapped": {gates.ALONE, plans.MIXED},
    "recurrent state in FP16": {gates.DTYPES, drift.SCENARIO},
    "a page mix-up": {gates.ALONE, plans.MIXED},
    "tokens of a step from 128 on wrong": {gates.ALONE_AT_LIMITS, envelope.SCENARIO},
    "logits × 1.05": {gates.ALONE, plans.MIXED},
}
"""A fault of each family, and scenarios that catch it."""


class Right(NamedTuple):
    model: LoadedModel
    config: BuildConfig
    graph: Path

    def failed(self, graph: Path, seed: int = 0, **options: int) -> list[Gate]:
        plan = plan_validation(self.model, self.config, seed=seed, **options)
        report = validate(self.model, self.config, graph_candidate(OnnxGraph.read(graph)), plan)
        return [gate for gate in report.gates if not gate.passed]

    def broken(self, fault: Fault, folder: Path) -> Path:
        graph = shutil.copytree(self.graph.parent, folder / "broken") / "model.onnx"
        broken(graph, fault.inject)
        return graph


@pytest.fixture(scope="module")
def right(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Right:
    """A right BF16 graph of every kind of layer, with pages so small that a sequence has several."""
    return built(checkpoint, tmp_path_factory.mktemp("right"), "bf16")


def built(checkpoint: Path, folder: Path, precision: str) -> Right:
    model = load(checkpoint)
    config = BuildConfig(model.folder, folder, precision=precision, page_size=16, **SMALL_LIMITS)
    lower(model, trace(model, config), folder / "model.onnx")
    return Right(model, config, folder / "model.onnx")


def test_each_family_has_a_fault_here() -> None:
    names = [{fault.name for fault in faults} for faults in FAMILIES.values()]
    assert all(len(SCENARIOS.keys() & family) == 1 for family in names)
    assert len(set.union(*names)) == len(FAULTS)


@pytest.mark.parametrize(
    "fault", [fault for fault in FAULTS if fault.name in SCENARIOS], ids=lambda f: f.name
)
def test_a_fault_is_caught_and_blamed_on_its_own_layer(
    right: Right, fault: Fault, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(plans, "NUM_DECODE", DECODE_STEPS)
    hides_in_baseline = gates.DTYPES in SCENARIOS[fault.name]
    failed = right.failed(right.broken(fault, tmp_path), drift_steps=DRIFT_STEPS if hides_in_baseline else 0)
    outputs = defaultdict(set)
    for gate in failed:
        outputs[gate.scenario].add(gate.output.split()[0])
    place = fault.place(right.model.config.numbered_layers)
    if hides_in_baseline:
        # Its rounding is that of the activations which the state is made of.
        state = f"ssm_state.{place.removeprefix('layers.')}"
        later = [index for index, kind in right.model.config.numbered_layers.items() if kind == fault.kind][1]
        differing = {f"layers.{later}"}
        assert outputs == {gates.DTYPES: {state}, drift.SCENARIO: {state}, SAME_PROGRAM: differing}
    else:
        assert outputs.keys() >= SCENARIOS[fault.name]
        assert outputs[gates.ALONE] | outputs[gates.ALONE_AT_LIMITS] == {place}
        assert all(node.startswith(f"{place}.") for node in outputs[layerwise.OPS_ALONE])
    if fault.name == "a page mix-up":
        assert Metric.OUT_OF_BOUNDS in {gate.metric for gate in failed}


def groups_of_another_number(graph: Graph) -> None:
    scan = graph.op(SCAN.name)
    heads = int(operand(SCAN, scan, "x").shape[1])
    graph.with_body(SCAN, {"G": heads})
    for name in ("B", "C"):
        value = operand(SCAN, scan, name)
        groups = np.arange(heads) % value.shape[1]
        graph.feed(scan, value.name, graph.before(scan, "Gather", value, groups, axis=1))


def test_an_op_with_an_input_of_another_shape_fails_its_gates(right: Right, tmp_path: Path) -> None:
    graph = right.broken(Fault("", "mamba", groups_of_another_number), tmp_path)
    workload = workload_of(right.model, right.config, 0)
    failed, _, _ = layerwise.compare_parts(
        right.model, right.config, OnnxGraph.read(graph), workload, Envelope.of(right.config)
    )
    alone = {
        gate.output: gate.metric
        for gate in failed
        if gate.scenario == layerwise.OPS_ALONE and not gate.passed
    }
    assert alone == dict.fromkeys(
        ("layers.0.mixer.scan y", "layers.0.mixer.scan next_ssm_state"), Metric.NOT_FINITE
    )


def test_a_fault_that_never_acts_changes_nothing(right: Right, tmp_path: Path) -> None:
    effects = Effects(right.model, right.config, right.graph)
    never, always = (
        next(fault for fault in FAULTS if fault.name == name)
        for name in ("softplus without threshold", "last row of the embeddings zero")
    )
    assert effects.largest(right.broken(never, tmp_path / "never")) == 0
    assert effects.largest(right.broken(always, tmp_path / "always")) > 0


def test_a_right_graph_raises_no_alarm_on_a_short_run(right: Right, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(plans, "NUM_DECODE", DECODE_STEPS)
    assert right.failed(right.graph, drift_steps=DRIFT_STEPS) == []


@pytest.mark.slow
@pytest.mark.parametrize("precision", ["fp32", "fp16", "bf16"])
def test_a_right_graph_raises_no_alarm_over_twenty_seeds(
    checkpoint: Path, tmp_path: Path, precision: str
) -> None:
    right = built(checkpoint, tmp_path, precision)
    assert {seed: failed for seed in range(20) if (failed := right.failed(right.graph, seed))} == {}
