"""Polygraphy's Comparator over PyTorch and ONNX Runtime: it sees agreement, a broken weight, and what is missing."""

from __future__ import annotations

import shutil
from collections import OrderedDict
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from faults import broken
from polygraphy.comparator import Comparator, IterationResult, RunResults, SimpleCompareFunc

from nemotrt.exporter.config import BuildConfig
from nemotrt.exporter.errors import ValidationError
from nemotrt.exporter.pipelines import build
from nemotrt.exporter.runtime import manifest as manifests
from nemotrt.exporter.stages.load import load
from nemotrt.exporter.validation.plan import MIXED, Workload
from nemotrt.exporter.validation.runners.polygraphy import (
    RelativeL2,
    StepRunner,
    feed_dicts,
    graph_runner,
)
from nemotrt.exporter.validation.runners.torch import TorchRunner

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def example(tmp_path_factory: pytest.TempPathFactory) -> SimpleNamespace:
    """The example in FP32: its bundle, PyTorch as a Polygraphy runner, and the feed dicts of a mixed batch."""
    folder = tmp_path_factory.mktemp("polygraphy")
    config = BuildConfig(
        ROOT / "examples" / "tiny", folder / "bundle", "fp32", validate=False, runtime="onnx"
    )
    build.build(config)
    model = load(config.checkpoint)
    pools = model.pools(config)
    workload = Workload(90, 4, 0, model.config.vocab_size, config.page_size)
    noise = workload.noise(pools)
    mixed = workload.scenarios(workload.random_tokens(4))[MIXED]

    def open_torch() -> TorchRunner:
        return TorchRunner(model, pools, torch.float32)

    return SimpleNamespace(
        bundle=config.output,
        manifest=manifests.read(config.output),
        pytorch=StepRunner("PyTorch", pools, open_torch),
        feeds=list(feed_dicts(open_torch(), mixed, noise)),
        num_pages=workload.sizes.num_pages,
    )


def graph_of(example: SimpleNamespace, bundle: Path | None = None) -> StepRunner:
    return graph_runner(bundle or example.bundle, num_pages=example.num_pages)


def test_polygraphy_sees_that_they_agree(example: SimpleNamespace, tmp_path: Path) -> None:
    results = Comparator.run([example.pytorch, graph_of(example)], data_loader=example.feeds)
    outputs = {"logits", *(f"next.{pool.name}" for pool in example.manifest.graph.pools)}
    assert [set(iterations[0]) for _, iterations in results] == [outputs, outputs]
    found = Comparator.compare_accuracy(results, compare_func=RelativeL2())
    assert found
    (pair,) = found[0]
    assert [set(step) for step in found[0][pair]] == [outputs] * len(example.feeds)
    assert Comparator.compare_accuracy(results, compare_func=SimpleCompareFunc(atol=1e-3, rtol=0))
    results.save(str(tmp_path / "outputs.json"))
    kept = RunResults.load(str(tmp_path / "outputs.json"))
    assert Comparator.compare_accuracy(kept, compare_func=RelativeL2())


def test_polygraphy_sees_a_broken_weight(example: SimpleNamespace, tmp_path: Path) -> None:
    shutil.copytree(example.bundle, tmp_path / "bundle")
    broken(tmp_path / "bundle" / "model.onnx", lambda graph: graph.weight("in_proj.weight").__imul__(1.01))
    results = Comparator.run(
        [example.pytorch, graph_of(example, tmp_path / "bundle")], data_loader=example.feeds
    )
    found = Comparator.compare_accuracy(results, compare_func=RelativeL2())
    assert not found
    (pair,) = found[0]
    assert all(not step["logits"] for step in found[0][pair])


def test_the_state_is_carried_from_feed_to_feed(example: SimpleNamespace) -> None:
    """A runner that takes a later step's feed alone gives what it gives in order: nothing hides in the runner."""
    runner = graph_of(example)
    with runner:
        in_order = [runner.infer(feed)["logits"] for feed in example.feeds]
        alone = runner.infer(example.feeds[-1])["logits"]
    assert np.array_equal(in_order[-1], alone)
    assert not np.array_equal(example.feeds[0]["ssm_state.0"], example.feeds[1]["ssm_state.0"])


def result(name: str, **outputs: list[float]) -> IterationResult:
    arrays = OrderedDict((output, np.asarray(values, np.float32)) for output, values in outputs.items())
    return IterationResult(outputs=arrays, runner_name=name)


def test_a_missing_output_is_no_pass() -> None:
    whole, lacking = result("one", a=[1.0], b=[2.0]), result("other", a=[1.0])
    assert SimpleCompareFunc()(whole, lacking)  # what it would have been
    for pair in ((whole, lacking), (lacking, whole)):
        with pytest.raises(ValidationError, match="other has no output b: nothing was compared"):
            RelativeL2()(*pair)


@pytest.mark.parametrize("values", [[float("nan"), 1.0], [float("inf"), 1.0], [1.01, 1.0]])
def test_what_is_off_or_not_finite_is_no_pass(values: list[float]) -> None:
    assert RelativeL2()(result("one", a=values), result("other", a=[1.0, 1.0])) == {"a": False}
    assert RelativeL2()(result("one", a=values), result("other", a=values)) == {
        "a": np.isfinite(values).all()
    }


def test_the_documented_program_runs(
    example: SimpleNamespace,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    program = (ROOT / "docs" / "comparing.md").read_text().split("```python\n")[1].split("```")[0]
    (tmp_path / "tiny.bundle").symlink_to(example.bundle)
    (tmp_path / "examples").symlink_to(ROOT / "examples")
    monkeypatch.chdir(tmp_path)
    exec(compile(program, "docs/comparing.md", "exec"), {})
    assert capsys.readouterr().out.splitlines()[-1] == "True"
    assert (tmp_path / "outputs.json").is_file()
