"""A reference file gives the same verdict as PyTorch, and other bundles are compared by the same means."""

from __future__ import annotations

import dataclasses
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from checkpoints import SMALL_LIMITS, write_checkpoint
from faults import Graph, broken

from nemotrt.exporter.config import BuildConfig
from nemotrt.exporter.errors import BundleError, NotFiniteError
from nemotrt.exporter.pipelines import build
from nemotrt.exporter.pipelines.opened_bundle import open_bundle
from nemotrt.exporter.pipelines.validate import revalidate
from nemotrt.exporter.report.model import Metric, ValidationReport
from nemotrt.exporter.runtime import manifest as manifests
from nemotrt.exporter.runtime.graph_file import OnnxGraph
from nemotrt.exporter.validation import gates, routing
from nemotrt.exporter.validation import plan as plans
from nemotrt.exporter.validation.candidates import graph_candidate
from nemotrt.exporter.validation.comparison import ReferenceRun, compare, force_routing
from nemotrt.exporter.validation.plan import MIXED, PREFILL, plan_validation
from nemotrt.exporter.validation.references import reference_file
from nemotrt.exporter.validation.request import ValidationRequest
from nemotrt.exporter.validation.routing import RouterPolicy
from nemotrt.exporter.validation.runners.base import ForcedRoutingRunner, GraphRunner, Mode
from nemotrt.exporter.validation.validate import validate


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> SimpleNamespace:
    """A BF16 bundle, what PyTorch showed of it, and the report beside PyTorch."""
    folder = tmp_path_factory.mktemp("golden")
    checkpoint = write_checkpoint(folder / "checkpoint")
    config = BuildConfig(
        checkpoint, folder / "bundle", "bf16", runtime="onnx", validate=False, **SMALL_LIMITS
    )
    build.build(config)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(plans, "NUM_DECODE", 6)
        subject = open_bundle(config.output, checkpoint, None)
        runs: list[ReferenceRun] = []
        candidate = graph_candidate(subject.graph)
        plan = plan_validation(subject.model, subject.config, drift_steps=0)
        report = validate(subject.model, subject.config, candidate, plan, recorded=runs.append)
    manifest = manifests.read(config.output)
    path = folder / "model.golden"
    reference_file.save(path, runs[0], reference_file.identity_of(manifest))
    return SimpleNamespace(
        checkpoint=checkpoint, bundle=config.output, manifest=manifest, golden=path, run=runs[0],
        report=report, graph=subject.graph,
    )  # fmt: skip


def by_golden(bundle: Path, golden: Path) -> ValidationReport:
    return revalidate(ValidationRequest(bundle, golden=golden))


def test_a_golden_comes_back_as_it_was(made: SimpleNamespace) -> None:
    found = reference_file.read(made.golden, made.bundle, made.manifest)
    run: ReferenceRun = made.run
    assert found.workload == run.workload
    assert found.baselines == run.baselines
    assert list(found.scenarios) == list(run.scenarios)
    for name, observation in run.observations.items():
        assert np.array_equal(found.observations[name].logits_RV, observation.logits_RV)
        for pool, values in observation.pools.items():
            assert np.array_equal(found.observations[name].pools[pool], values), pool
        for ours, theirs in zip(found.observations[name].routers, observation.routers, strict=True):
            assert all(np.array_equal(a, b) for a, b in zip(ours, theirs, strict=True))
    for ours, theirs in zip(found.policies, run.policies, strict=True):
        assert np.array_equal(ours.correction_bias, theirs.correction_bias)


def test_a_golden_judges_as_pytorch_does(made: SimpleNamespace) -> None:
    """The same gates with the same limits; the same values where no expert was chosen otherwise."""
    found = by_golden(made.bundle, made.golden)
    assert found.passed, [gate for gate in found.gates if not gate.passed]
    whole = set(made.run.scenarios) | {"dtypes"}
    live = {(g.scenario, g.output, g.metric): g for g in made.report.gates if g.scenario in whole}
    own = {(g.scenario, g.output, g.metric): g for g in found.gates}
    assert set(own) == set(live)
    for key, gate in own.items():
        if gate.metric not in (Metric.TOP1_MARGIN, Metric.MODES_DIFFER):
            assert gate.baseline == live[key].baseline
        if not found.routing_mismatches.get(gate.scenario):
            assert gate == live[key]
    assert found.routing_mismatches == made.report.routing_mismatches
    assert set(reference_file.ABSENT) <= set(found.not_compared)


def test_where_there_is_no_pytorch_a_golden_judges_still(made: SimpleNamespace, tmp_path: Path) -> None:
    program = """if True:
        import sys

        class Nothing:
            def find_spec(self, name, path=None, target=None):
                if name.partition(".")[0] in ("torch", "transformers", "safetensors"):
                    raise ImportError(name)

        sys.meta_path.insert(0, Nothing())
        from nemotrt.exporter.cli import main
        main()
    """
    outputs = ["--json", "--html", str(tmp_path / "page.html"), "--junit", str(tmp_path / "gates.xml")]
    arguments = ["validate", str(made.bundle), "--golden", str(made.golden), *outputs]
    done = subprocess.run(
        [sys.executable, "-c", program, *arguments], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert '"passed": true' in done.stdout
    assert (tmp_path / "page.html").stat().st_size > 1000


def test_a_golden_finds_a_wrong_weight(made: SimpleNamespace, tmp_path: Path) -> None:
    candidate = graph_candidate(OnnxGraph.read(damaged(made.graph.path, tmp_path)))
    run = reference_file.read(made.golden, made.bundle, made.manifest)
    report = compare(run, candidate, force_routing(run, candidate))
    assert not report.passed


def damaged(graph: Path, folder: Path) -> Path:
    """A copy of the graph whose first MLP gives half as much again; 2% more would hide in the baseline of BF16."""
    for path in graph.parent.glob("model.onnx*"):
        (folder / path.name).write_bytes(path.read_bytes())
    broken(folder / graph.name, lambda found: found.weight("mixer.down_proj.weight").__imul__(1.5))
    return folder / graph.name


def turned(made: SimpleNamespace, folder: Path, by: float) -> Path:
    """A copy of the graph that scores another expert higher where, of the first layer's, a choice is nearest a tie.

    `by` is how much, as a share of what a score may be off.
    """
    run: ReferenceRun = made.run
    policy = run.policies[0]
    logits_TE = np.concatenate([step[0] for seen in run.observations.values() for step in seen.routers])
    margin_T = policy.margin(logits_TE)
    nearest = int(margin_T.argmin())
    next_best = int(np.argsort(-policy.ranking(logits_TE[[nearest]])[0])[policy.top_k])
    score = routing.scores(logits_TE)[nearest, next_best]
    baselines = run.baselines.values()
    higher = score + by * min(
        gates.score_limits(baseline, len(baseline.router_scores))[0] for baseline in baselines
    )
    added = np.zeros(logits_TE.shape[1], np.float32)
    added[next_best] = np.log(higher / (1 - higher)) - np.log(score / (1 - score))

    def prefer(found: Graph) -> None:
        node = found.op("NemoMoeDispatch")
        own = node.inputs[1]
        preferring = found.before(node, "Add", own, added)
        preferring.type, preferring.shape = own.type, own.shape
        node.replace_input_with(1, preferring)

    for path in made.graph.path.parent.glob("model.onnx*"):
        (folder / path.name).write_bytes(path.read_bytes())
    broken(folder / made.graph.path.name, prefer)
    return folder / made.graph.path.name


def test_a_near_tie_is_compared_on_the_reference_s_choice(made: SimpleNamespace, tmp_path: Path) -> None:
    run = reference_file.read(made.golden, made.bundle, made.manifest)
    candidate = graph_candidate(OnnxGraph.read(turned(made, tmp_path, 0.5)))
    report = compare(run, candidate, force_routing(run, candidate))
    assert sum(report.routing_mismatches.values())
    assert report.passed, [gate for gate in report.gates if not gate.passed]
    assert len(report.gates) == len(by_golden(made.bundle, made.golden).gates)
    unforced = dataclasses.replace(candidate, open_forced=None)
    report = compare(run, unforced, force_routing(run, unforced))
    assert not report.passed


def test_what_is_no_near_tie_is_not_excused(made: SimpleNamespace, tmp_path: Path) -> None:
    run = reference_file.read(made.golden, made.bundle, made.manifest)
    candidate = graph_candidate(OnnxGraph.read(turned(made, tmp_path, 2)))
    report = compare(run, candidate, force_routing(run, candidate))
    assert Metric.ROUTER_SCORE in {gate.metric for gate in report.gates if not gate.passed}


def test_a_graph_that_is_told_nothing_is_the_graph(made: SimpleNamespace) -> None:
    run: ReferenceRun = made.run
    plain = GraphRunner(made.graph, **run.workload.sizes._asdict(), mode=Mode.UNBOUND)
    led = ForcedRoutingRunner(made.graph)
    plain.reset(run.noise_of(PREFILL))
    led.reset(run.noise_of(PREFILL))
    for inputs in run.scenarios[MIXED]:
        assert np.array_equal(plain.step(inputs), led.step(inputs))
        for one, other in zip(plain.router_logits(), led.router_logits(), strict=True):
            assert np.array_equal(one, other)
    assert all(np.array_equal(plain.pool(name), led.pool(name)) for name in run.noise_of(PREFILL))


def test_a_graph_that_is_told_an_expert_takes_it(made: SimpleNamespace) -> None:
    run: ReferenceRun = made.run
    inputs = run.scenarios[PREFILL][0]
    runner = ForcedRoutingRunner(made.graph)
    runner.reset(run.noise_of(PREFILL))
    own = runner.step(inputs)
    shown = runner.router_logits()
    told = [np.full_like(logits_TE, np.nan) for logits_TE in shown]
    told[-1][40] = -shown[-1][40]
    runner.reset(run.noise_of(PREFILL))
    led = runner.step(inputs, tuple(told))
    assert np.array_equal(led[:40], own[:40])
    assert not np.array_equal(led[40], own[40])
    assert all(np.array_equal(one, other) for one, other in zip(shown, runner.router_logits(), strict=True))


@pytest.mark.parametrize(("distance", "is_near"), [(1.9e-3, True), (2.1e-3, False)])
def test_a_near_tie_is_what_two_errors_can_turn(distance: float, is_near: bool) -> None:
    scores = np.array([[0.9, 0.5, 0.5 - distance, 0.2]])
    logits = np.log(scores / (1 - scores)).astype(np.float32)
    policy = RouterPolicy(0, np.zeros(4, np.float32), top_k=2, num_groups=1, topk_group=1)
    assert policy.near_tie(logits, 1e-3).tolist() == [is_near]


def test_groups_may_be_nearly_tied_too() -> None:
    scores = np.array([[0.9, 0.5, 0.7, 0.702, 0.1, 0.1]])
    logits = np.log(scores / (1 - scores)).astype(np.float32)
    policy = RouterPolicy(0, np.zeros(6, np.float32), top_k=2, num_groups=3, topk_group=1)
    assert policy.margin(logits)[0] > 1
    assert policy.near_tie(logits, 1e-3).tolist() == [True]
    assert policy.near_tie(logits, 1e-4).tolist() == [False]


def test_no_golden_is_made_of_a_reference_that_is_not_finite(made: SimpleNamespace, tmp_path: Path) -> None:
    seen = made.run.observations[PREFILL].logits_RV
    before = seen[3, 4]
    seen[3, 4] = np.nan
    try:
        with pytest.raises(NotFiniteError, match="prefill, logits: the reference is not finite"):
            reference_file.save(tmp_path / "x.golden", made.run, reference_file.identity_of(made.manifest))
    finally:
        seen[3, 4] = before
    assert list(tmp_path.iterdir()) == []


def test_a_changed_byte_is_seen(made: SimpleNamespace, tmp_path: Path) -> None:
    content = bytearray(made.golden.read_bytes())
    content[-5] ^= 1
    (tmp_path / "x.golden").write_bytes(content)
    with pytest.raises(BundleError, match="was changed after it was written"):
        reference_file.read(tmp_path / "x.golden", made.bundle, made.manifest)


def test_two_bundles_of_a_model_agree_at_another_precision(
    made: SimpleNamespace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(plans, "NUM_DECODE", 6)
    other = tmp_path / "fp32"
    build.build(BuildConfig(made.checkpoint, other, "fp32", runtime="onnx", validate=False, **SMALL_LIMITS))
    for one, reference in ((made.bundle, other), (other, made.bundle), (other, other)):
        report = revalidate(ValidationRequest(one, against=reference))
        assert report.passed, [gate for gate in report.gates if not gate.passed]
        assert report.reference.startswith(f"{reference.name}, ONNX Runtime (")
        is_absolute = one == reference == other
        assert report.baseline == (
            "" if is_absolute else "PyTorch (BF16) against FP32, on the fp32 bundle's weights"
        )


def test_another_bundle_s_wrong_weight_is_found(
    made: SimpleNamespace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Which of the two is wrong, no comparison of two says."""
    monkeypatch.setattr(plans, "NUM_DECODE", 6)
    other = tmp_path / "other"
    build.build(BuildConfig(made.checkpoint, other, "bf16", runtime="onnx", validate=False, **SMALL_LIMITS))
    graph = other / "model.onnx"
    broken(graph, lambda found: found.weight("mixer.down_proj.weight").__imul__(1.5))
    roles = {file.path: file.role for file in made.manifest.files}
    changed = manifests.read(other)
    manifests.write(other, dataclasses.replace(changed, files=manifests.describe_files(other, roles)))
    for one, reference in ((made.bundle, other), (other, made.bundle)):
        assert not revalidate(ValidationRequest(one, against=reference)).passed
