"""A model that fits no machine as a whole: one layer in memory at a time, and a report that says what it left out."""

from __future__ import annotations

import json
import shutil
import weakref
from pathlib import Path

import pytest
import torch
from checkpoints import write_checkpoint
from click.testing import CliRunner, Result
from faults import broken
from faults.weights import zeroed_expert

from nemotrt.exporter.checkpoint.loaded_model import LoadedModel
from nemotrt.exporter.cli import program
from nemotrt.exporter.pipelines import estimates
from nemotrt.exporter.pipelines.opened_bundle import open_bundle
from nemotrt.exporter.pipelines.validate import trace_for_bisection
from nemotrt.exporter.report.model import Metric
from nemotrt.exporter.stages.load import load
from nemotrt.exporter.validation import gates
from nemotrt.exporter.validation.envelope import Envelope
from nemotrt.exporter.validation.parts import part_run
from nemotrt.exporter.validation.parts.bisection import bisect
from nemotrt.exporter.validation.parts.layerwise import compare_parts
from nemotrt.exporter.validation.parts.torch_parts import PartModules
from nemotrt.exporter.validation.plan import workload_of


def run(*arguments: object) -> Result:
    return CliRunner().invoke(program, [str(argument) for argument in arguments])


@pytest.fixture(scope="module")
def half(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint in BF16."""
    return write_checkpoint(tmp_path_factory.mktemp("half") / "checkpoint", torch_dtype="bfloat16")


@pytest.fixture(scope="module")
def bundle(half: Path) -> Path:
    output = half.parent / "bundle"
    limits = ("--max-tokens", "136", "--max-sequences", "2", "--max-context", "128")
    result = run("build", half, "--output", output, "--runtime", "onnx", "--no-validate", *limits)
    assert result.exit_code == 0, result.output
    return output


def test_a_model_that_does_not_fit_is_compared_layer_by_layer(
    bundle: Path, half: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(estimates, "memory_bytes", lambda: 502_500_000)
    refused = run("validate", bundle, "--checkpoint", half)
    assert refused.exit_code == 2
    assert "--layers-alone" in refused.stderr
    page = tmp_path / "report.html"
    result = run("validate", bundle, "--checkpoint", half, "--layers-alone", "--json", "--html", page)
    assert result.exit_code == 0, result.output
    report = json.loads(result.stdout)
    assert (report["verdict"], report["is_whole"]) == ("passed, each layer alone", False)
    assert any("--layers-alone" in entry["detail"] for entry in report["not_compared"])
    assert {gate["scenario"] for gate in report["gates"]} == {
        "dtypes",
        "each layer alone",
        "each op alone",
        "envelope, layers alone",
        "limits of the profile",
        "same program",
        "weights",
    }
    text = page.read_text()
    assert "Passed, each layer alone" in text
    assert "Next-token" not in text
    monkeypatch.setattr(estimates, "memory_bytes", lambda: 500_000_000)
    refused = run("validate", bundle, "--layers-alone")
    assert refused.exit_code == 2
    assert "comparing" in refused.stderr


def test_the_table_makes_no_more_of_it(bundle: Path) -> None:
    result = run("validate", bundle, "--layers-alone")
    assert result.exit_code == 0
    assert "passed, each layer alone: " in result.stdout
    assert "its logits were not compared" in " ".join(result.stdout.split())


def test_what_needs_the_whole_model_is_refused(bundle: Path, tmp_path: Path) -> None:
    text = tmp_path / "text.txt"
    text.write_text("text")
    assert run("validate", bundle, "--layers-alone", "--eval", text).exit_code == 2


def test_bisect_is_part_of_the_report(bundle: Path, half: Path, tmp_path: Path) -> None:
    page = tmp_path / "report.html"
    result = run("validate", bundle, "--checkpoint", half, "--layers-alone", "--bisect", "--html", page)
    assert result.exit_code == 0, result.output
    assert "no value diverges" in result.stdout
    assert "No value diverges" in page.read_text()
    wrong = shutil.copytree(bundle, tmp_path / "wrong")
    broken(wrong / "model.onnx", zeroed_expert)
    arguments = ("validate", wrong, "--checkpoint", half, "--layers-alone", "--bisect", "--html", page)
    result = run(*arguments)
    assert result.exit_code == 6
    assert "layers.1.mixer.experts diverges from PyTorch" in result.stderr
    assert "experts.up: DIFFERS from the checkpoint in 384" in " ".join(result.stdout.split())
    assert "experts.up: DIFFERS" in page.read_text()
    bisection = json.loads(run(*arguments, "--json").stdout)["bisect"]
    assert [value["node"] for value in bisection["diverging"]] == ["layers.1.mixer.experts"]


def experts(modules: PartModules, dtype: torch.dtype) -> torch.Tensor:
    return modules.module("layers.1", dtype).get_parameter("mixer.experts.up")


def test_a_layer_has_one_copy_of_its_experts(half: Path, bundle: Path) -> None:
    def checked(model: LoadedModel) -> None:
        modules = PartModules(model)
        wide, narrow = experts(modules, torch.float32), experts(modules, torch.bfloat16)
        assert wide.dtype == torch.bfloat16
        assert wide.data_ptr() == narrow.data_ptr()

    checked(load(half))
    own = open_bundle(bundle, None, None).model
    checked(own)
    # The bundle's own are mapped: no bytes of them are anonymous memory.
    mapped = experts(PartModules(own), torch.bfloat16)
    lines = [line.split() for line in Path("/proc/self/maps").read_text().splitlines()]
    spans = {tuple(int(end, 16) for end in line[0].split("-")): line[-1] for line in lines}
    (file,) = [name for (begin, end), name in spans.items() if begin <= mapped.data_ptr() < end]
    assert file == str((bundle / "model.onnx.data").resolve())


def test_another_layer_takes_the_place_of_the_one_before(half: Path) -> None:
    modules = PartModules(load(half))
    modules.module("layers.1", torch.float32)
    modules.module("layers.2", torch.float32)
    assert all(name.startswith("backbone.layers.2.") for name, _ in modules._tensors)


@pytest.mark.parametrize("inside", [False, True], ids=["layers", "bisect"])
def test_no_more_than_one_part_is_alive(bundle: Path, monkeypatch: pytest.MonkeyPatch, inside: bool) -> None:
    alive: list[tuple[str, weakref.ref[torch.nn.Module]]] = []
    make = PartModules.module

    def watched(self: PartModules, part: str, dtype: torch.dtype) -> torch.nn.Module:
        assert {other for other, module in alive if module() is not None} <= {part}
        alive.append((part, weakref.ref(made := make(self, part, dtype))))
        return made

    monkeypatch.setattr(PartModules, "module", watched)
    subject = open_bundle(bundle, None, None)
    model, config = subject.model, subject.config
    if inside:
        traces = trace_for_bisection(model, config)
        bisect(model, config, subject.graph, workload_of(model, config, 0), *traces)
    else:
        compare_parts(model, config, subject.graph, workload_of(model, config, 0), Envelope.of(config))
    assert len(alive) == 2 * 8


def test_rows_of_all_sizes_reach_the_epsilon_and_stay_finite_in_fp16() -> None:
    generator = torch.Generator().manual_seed(0)
    usual = torch.randn(400, 64, generator=generator)
    usual[1] = 0
    rows = part_run.of_all_sizes(usual, 1e-5, generator)
    size_R = rows.square().mean(1)
    assert not rows[1].any()
    assert size_R[1::4].max() <= 1.001e-5
    assert size_R[1::4].sort().values[5] < 1e-10
    assert size_R[2::4].min() > 100 * size_R[::4].max()
    outliers = part_run.of_all_sizes(2000 * usual, 1e-5, generator)
    assert outliers.half().isfinite().all()
    assert (outliers.abs().amax(1) >= 999 * usual.abs().amax(1))[2::4].all()  # never smaller than usual


@pytest.mark.parametrize("factor", [1.0, 1.003])
def test_a_factor_below_the_rounding_shows_in_the_norm_of_many_tokens(factor: float) -> None:
    reference = torch.randn(400, 128, generator=torch.Generator().manual_seed(0))
    rounded = reference.bfloat16().double().numpy()
    values, baseline = ({"": (side, reference.double().numpy())} for side in (factor * rounded, rounded))
    failed = [
        gate for gate in gates.layer_gates("alone", "layers.0", values, baseline, {}) if not gate.passed
    ]
    assert [gate.metric for gate in failed] == [Metric.NORM_RATIO] * (factor != 1)
