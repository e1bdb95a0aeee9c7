"""The gates: a right graph passes in every precision, and each injected fault is caught."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest
import torch
from checkpoints import SMALL_LIMITS
from faults import broken

from nemotrt.exporter.checkpoint.loaded_model import LoadedModel
from nemotrt.exporter.config import BuildConfig
from nemotrt.exporter.report.model import Gate, Metric, ValidationReport
from nemotrt.exporter.runtime.graph_file import OnnxGraph
from nemotrt.exporter.stages.load import load
from nemotrt.exporter.stages.lower import lower
from nemotrt.exporter.stages.trace import trace
from nemotrt.exporter.validation import gates, metrics
from nemotrt.exporter.validation import plan as plans
from nemotrt.exporter.validation.candidates import graph_candidate
from nemotrt.exporter.validation.comparison import Candidate
from nemotrt.exporter.validation.envelope import SequenceChunk, packed_step
from nemotrt.exporter.validation.observation import Observation, observed
from nemotrt.exporter.validation.parts import layerwise
from nemotrt.exporter.validation.references import pytorch
from nemotrt.exporter.validation.routing import RouterPolicy
from nemotrt.exporter.validation.runners.base import Mode, Recurrence
from nemotrt.exporter.validation.runners.torch import TorchRunner
from nemotrt.exporter.validation.validate import validate
from nemotrt.model.moe import Router
from nemotrt.plugins.contract import PoolSpec
from nemotrt.plugins.moe_dispatch.reference import route


@pytest.fixture(scope="module")
def loaded(checkpoint: Path) -> LoadedModel:
    return load(checkpoint)


def build(model: LoadedModel, folder: Path, precision: str) -> BuildConfig:
    folder.mkdir(parents=True)
    config = BuildConfig(checkpoint=model.folder, output=folder, precision=precision, **SMALL_LIMITS)
    lower(model, trace(model, config), folder / "model.onnx")
    return config


@pytest.mark.parametrize("precision", ["fp32", "fp16", "bf16"])
def test_a_right_graph_passes(loaded: LoadedModel, tmp_path: Path, precision: str) -> None:
    config = build(loaded, tmp_path / "graph", precision)
    candidate = graph_candidate(OnnxGraph.read(tmp_path / "graph" / "model.onnx"))
    plan, heard = plans.plan_validation(loaded, config), []
    report = validate(loaded, config, candidate, plan, advance=heard.append)
    assert sum(heard) == len(plan)
    assert report.passed, [gate for gate in report.gates if not gate.passed]
    compared = [gate for gate in report.gates if gate.metric == Metric.RELATIVE_L2]
    pools = {pool.name for pool in loaded.pools(config)}
    alone_scenarios = (gates.ALONE, gates.ALONE_AT_LIMITS, layerwise.OPS_ALONE)
    assert {gate.output for gate in compared if gate.scenario not in alone_scenarios} == {"logits", *pools}
    layers = {f"layers.{index}" for index in loaded.config.numbered_layers}
    adding = {f"{place} adds" for place in layers}
    holding = {f"layers.{name.partition('.')[2]} {name}" for name in pools}
    alone = {gate.output for gate in compared if gate.scenario == gates.ALONE}
    assert alone == {"embeddings", "head", *layers, *adding, *holding}
    assert [layer.name for layer in report.layers] == [f"layers.{i}" for i in loaded.config.numbered_layers]
    ops = [op.name for op in report.ops]
    assert ops == [
        *["layers.0.mixer.conv"] * 2, *["layers.0.mixer.scan"] * 2, "layers.1.mixer.experts",
        *["layers.2.mixer.attention"] * 2, *["layers.4.mixer.conv"] * 2, *["layers.4.mixer.scan"] * 2,
        "layers.5.mixer.experts",
    ]  # fmt: skip
    assert [gate.value for gate in report.gates if gate.scenario == layerwise.OPS_ALONE] == [
        op.error for op in report.ops
    ]


@pytest.mark.parametrize("groups", [1, 4])
def test_experts_are_chosen_as_the_op_chooses(groups: int) -> None:
    generator = np.random.default_rng(groups)
    logits = generator.standard_normal((50, 16)).astype(np.float32)
    logits[3] = 0  # all equal: the first ones are taken
    bias = generator.standard_normal(16).astype(np.float32) * np.float32(0.1)
    policy = RouterPolicy(0, bias, top_k=3, num_groups=groups, topk_group=2 if groups > 1 else 1)
    options = {"norm_topk_prob": 1, "routed_scaling_factor": 1.0}
    sizes = {"top_k": 3, "num_groups": groups, "topk_group": policy.topk_group}
    wanted, _ = route(torch.from_numpy(logits), torch.from_numpy(bias), **sizes, **options)
    assert np.array_equal(policy.experts(logits), wanted.sort(1).values.numpy())
    assert (policy.margin(logits) >= 0).all()


def test_a_fault_is_blamed_on_its_own_layer(loaded: LoadedModel, tmp_path: Path) -> None:
    config = build(loaded, tmp_path / "graph", "fp16")
    path = tmp_path / "graph" / "model.onnx"
    broken(path, lambda graph: graph.weights["backbone.layers.3.mixer.down_proj.weight"].__imul__(1.02))
    failed = [
        gate
        for gate in validate(loaded, config, graph_candidate(OnnxGraph.read(path))).gates
        if not gate.passed
    ]
    blamed = {gate.output.split()[0] for gate in failed if gate.scenario == gates.ALONE}
    assert blamed == {"layers.3"}


def scale_expert(weights: dict[str, np.ndarray]) -> None:
    weights["backbone.layers.1.mixer.experts.up"][1] = 0


def scale_head(weights: dict[str, np.ndarray]) -> None:
    weights["lm_head.weight"] *= 1.02


def drop_conv_bias(weights: dict[str, np.ndarray]) -> None:
    weights["backbone.layers.4.mixer.conv1d.bias"][:] = 0


def drop_skip(weights: dict[str, np.ndarray]) -> None:
    weights["backbone.layers.0.mixer.D"][:] = 1


def drop_correction_bias(weights: dict[str, np.ndarray]) -> None:
    weights["backbone.layers.5.mixer.gate.e_score_correction_bias"][:] = 0


def negate_decay(weights: dict[str, np.ndarray]) -> None:
    weights["backbone.layers.4.mixer.A"] *= 1.05


def swap_experts(weights: dict[str, np.ndarray]) -> None:
    weights["backbone.layers.5.mixer.experts.down"][[0, 1]] = weights["backbone.layers.5.mixer.experts.down"][
        [1, 0]
    ]


def one_nan(weights: dict[str, np.ndarray]) -> None:
    weights["backbone.layers.3.mixer.up_proj.weight"][5, 7] = np.nan


FAULTS = [
    scale_expert, scale_head, drop_conv_bias, drop_skip,
    drop_correction_bias, negate_decay, swap_experts, one_nan,
]  # fmt: skip


@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: fault.__name__)
def test_a_wrong_weight_is_caught(
    loaded: LoadedModel,
    tmp_path: Path,
    fault: Callable[[dict[str, np.ndarray]], None],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(plans, "NUM_DECODE", 4)  # the prompt alone finds every one of them
    config = build(loaded, tmp_path / "graph", "fp32")
    path = tmp_path / "graph" / "model.onnx"
    broken(path, lambda graph: fault(graph.weights))
    report = validate(loaded, config, graph_candidate(OnnxGraph.read(path)))
    assert not report.passed


def test_a_wrong_attribute_is_caught(loaded: LoadedModel, tmp_path: Path) -> None:
    config = build(loaded, tmp_path / "graph", "fp32")
    path = tmp_path / "graph" / "model.onnx"
    epsilon = ir.AttrFloat32("epsilon", 0.05)
    broken(path, lambda graph: graph.named("layers.3.norm.rms_norm").attributes.add(epsilon))
    assert not validate(loaded, config, graph_candidate(OnnxGraph.read(path))).passed


STEP = packed_step([SequenceChunk(np.zeros(1, dtype=np.int64), 0, 1, ())])
"""A step that writes slot 1."""


def judged(
    candidate: np.ndarray, reference: np.ndarray, noise: np.ndarray, **baseline: np.ndarray
) -> list[Gate]:
    """The gates of one recurrent pool [slots, 4] that fail, its logits being right."""

    def seen(pool: np.ndarray) -> Observation:
        pools = {"ssm_state.0": pool.astype(np.float32)}
        initial = {"ssm_state.0": noise.astype(np.float32)}
        return observed([np.ones((1, 3), np.float32)], pools.__getitem__, initial, [STEP])

    base = gates.measure(seen(baseline["baseline"]), seen(reference)) if baseline else None
    found = gates.scenario_gates("s", seen(candidate), seen(reference), base)
    return [gate for gate in found if not gate.passed]


@pytest.fixture
def tied(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every PyTorch model finds the first two experts of each MoE layer equally good."""
    make = TorchRunner.__init__

    def make_tied(self: TorchRunner, *arguments: Any) -> None:
        make(self, *arguments)
        for module in self._network.modules():
            if isinstance(module, Router):
                module.weight[1] = module.weight[0]
                module.e_score_correction_bias[1] = module.e_score_correction_bias[0]

    monkeypatch.setattr(TorchRunner, "__init__", make_tied)
    read_policies = pytorch.router_policies

    def tied_policies(model: LoadedModel) -> tuple[RouterPolicy, ...]:
        policies = read_policies(model)
        for policy in policies:
            policy.correction_bias[1] = policy.correction_bias[0]
        return policies

    monkeypatch.setattr(pytorch, "router_policies", tied_policies)


class Nudged(TorchRunner):
    """A candidate whose routers like the second expert better than the reference's do."""

    runs_as = "nudged"

    def __init__(self, model: LoadedModel, pools: tuple[PoolSpec, ...], nudge: float) -> None:
        super().__init__(model, pools, torch.float32)
        for module in self._network.modules():
            if isinstance(module, Router):
                module.register_forward_hook(partial(self._nudge, nudge), prepend=True)

    def recurrences(self) -> dict[str, Recurrence]:
        return {}

    def _nudge(self, nudge: float, router: Router, args: object, logits_TE: torch.Tensor) -> torch.Tensor:
        return logits_TE + nudge * (torch.arange(logits_TE.shape[1]) == 1)


@pytest.mark.usefixtures("tied")
@pytest.mark.parametrize(("nudge", "failing"), [(1e-6, set()), (1e-2, {Metric.ROUTER_SCORE})])
def test_only_a_near_tie_excuses_another_expert(
    loaded: LoadedModel, tmp_path: Path, nudge: float, failing: set[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(plans, "NUM_DECODE", 4)
    config = BuildConfig(checkpoint=loaded.folder, output=tmp_path, precision="fp32", **SMALL_LIMITS)
    pools = loaded.pools(config)
    modes = Mode.BOUND, Mode.UNBOUND
    candidate = Candidate("PyTorch", modes, lambda sizes, mode: Nudged(loaded, pools, nudge), ())
    report = validate(loaded, config, candidate)
    assert all(report.routing_mismatches.values())
    assert failing <= {gate.metric for gate in report.gates if not gate.passed}
    assert report.passed == (not failing)


def test_a_written_value_that_equals_its_noise_is_no_stray_write() -> None:
    noise = np.zeros((3, 4))
    reference = noise.copy()
    reference[1] = [0.5, 0.0, -0.25, 1.0]  # slot 1 was written, slot 2 was not
    candidate = reference + np.array([[0.0], [1e-7], [0.0]])
    assert not judged(candidate, reference, noise)
    candidate[2, 3] = 1e-7
    assert [gate.metric for gate in judged(candidate, reference, noise)] == [Metric.OUT_OF_BOUNDS]


def test_a_stray_write_in_one_mode_or_in_the_reference_is_found() -> None:
    pool = np.zeros((3, 4), np.float32)
    stray = pool.copy()
    stray[2, 3] = 1
    noise = {"ssm_state.0": pool.copy()}
    right, wrong = (
        observed([np.ones((1, 3), np.float32)], {"ssm_state.0": x}.__getitem__, noise, [STEP])
        for x in (pool, stray)
    )
    assert gates.same_bits("s", right, right).passed
    assert not gates.same_bits("s", right, wrong).passed
    failed = [gate.metric for gate in gates.scenario_gates("s", right, wrong, None) if not gate.passed]
    assert failed == [Metric.OUT_OF_BOUNDS]


def test_an_infinite_floor_is_no_limit() -> None:
    noise = np.zeros((2, 4))
    reference = noise + np.array([[0.0], [1.0]])
    overflowed = reference.copy()
    overflowed[1, 2] = np.inf
    failed = judged(reference * 7, reference, noise, baseline=overflowed)
    assert [gate.metric for gate in failed] == [Metric.BASELINE_NOT_FINITE]


def test_a_reference_that_is_not_finite_is_named() -> None:
    noise = np.zeros((2, 4))
    reference = noise + np.array([[0.0], [1.0]])
    reference[1, 2] = np.nan
    failed = judged(reference * 1, reference, noise)
    assert [gate.metric for gate in failed] == [Metric.NOT_FINITE, Metric.REFERENCE_NOT_FINITE]


def test_no_gate_is_no_pass() -> None:
    assert not ValidationReport("a", "b", "", {}, (), {}, ()).passed


def test_nan_is_no_pass() -> None:
    assert not Gate("s", "o", Metric.MEAN_KL, float("nan"), 1.0).passed


def test_metrics_see_what_they_are_for() -> None:
    values = np.random.default_rng(0).standard_normal((5, 7))
    assert metrics.relative_l2(values, values) == 0
    assert metrics.relative_l2(values * 1.5, values) == pytest.approx(0.5)
    assert metrics.cosine(values * 1.5, values) == pytest.approx(1)
    assert metrics.norm_ratio_error(values * 1.5, values) == pytest.approx(0.5)
    assert metrics.kl_divergence(values, values).max() == 0
    assert metrics.kl_divergence(values * 1.5, values).min() > 0
    assert metrics.relative_l2(values, values * 0) == float("inf")
    flipped = values.copy()
    flipped[2, values[2].argmax()] -= 100
    assert np.count_nonzero(metrics.mismatch_margins(flipped, values)) == 1
