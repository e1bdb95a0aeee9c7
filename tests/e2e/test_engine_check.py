"""`make engine-check` works on a stand-in for the GPU, fails where an engine errs, and says what is missing."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import engine_check
import pytest
from checkpoints import write_checkpoint
from click.testing import CliRunner
from fake_gpu import VERSION, FakeCuda, FakeEngine, add_engine, engine_of, fake_module

from nemotrt.exporter.config import BuildConfig
from nemotrt.exporter.engines.targets import Target
from nemotrt.exporter.errors import CompileError
from nemotrt.exporter.pipelines import build
from nemotrt.exporter.pipelines.validate import revalidate
from nemotrt.exporter.report.model import Metric
from nemotrt.exporter.runtime import cuda as cuda_module
from nemotrt.exporter.runtime import engine_session
from nemotrt.exporter.validation import candidates
from nemotrt.exporter.validation.request import ValidationRequest

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> SimpleNamespace:
    """A checkpoint, and its bundle with files that stand for an engine and a library."""
    folder = tmp_path_factory.mktemp("check")
    checkpoint = write_checkpoint(folder / "checkpoint")
    config = BuildConfig(
        checkpoint,
        folder / "bundle",
        "fp32",
        max_tokens=112,
        max_sequences=4,
        max_context=256,
        runtime="onnx",
        validate=False,
    )
    build.build(config)
    add_engine(config.output, config)
    return SimpleNamespace(checkpoint=checkpoint, bundle=config.output, config=config)


@pytest.fixture
def engine(built: SimpleNamespace, monkeypatch: pytest.MonkeyPatch) -> FakeEngine:
    """ONNX Runtime as the bundle's engine, on a GPU that is not there."""
    cuda = FakeCuda()
    fake = engine_of(built.bundle, built.config, cuda)
    monkeypatch.setattr(cuda_module.ctypes, "CDLL", lambda name: cuda)
    monkeypatch.setattr(engine_session, "load_module", lambda backend: fake_module(VERSION, fake))
    return fake


def test_an_engine_that_is_right_passes_every_gate(built: SimpleNamespace, engine: FakeEngine) -> None:
    said, report = engine_check.compare(built.checkpoint, built.bundle)
    assert "tensorrt-rtx (TensorRT-RTX 1.7.1 on Fake RTX (SM 89)): " in said
    assert len(report["gates"]) > 50
    assert any(gate["metric"] == Metric.MODES_DIFFER for gate in report["gates"])
    assert engine.cuda.launched > 50


def make_err(engine: FakeEngine, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its logits are off by 1%."""
    run = engine.session.run

    def slightly_wrong(names: Any, feeds: dict[str, Any]) -> list[Any]:
        logits, *pools = run(names, feeds)
        return [logits * 1.01, *pools]

    monkeypatch.setattr(
        engine,
        "session",
        SimpleNamespace(
            run=slightly_wrong, get_inputs=engine.session.get_inputs, get_outputs=engine.session.get_outputs
        ),
    )


def test_an_engine_that_errs_fails(
    built: SimpleNamespace, engine: FakeEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    make_err(engine, monkeypatch)
    with pytest.raises(
        CompileError, match="gates passed; the first that failed: prefill, logits: relative L2"
    ):
        engine_check.compare(built.checkpoint, built.bundle)


def test_every_kind_of_step_is_timed(
    built: SimpleNamespace, engine: FakeEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(engine_check, "TIMED", 2)
    _, figures = engine_check.speed(built.bundle)
    assert set(figures) == {
        *(
            f"decode, {who}, {how}"
            for who in ("1 sequence", "4 sequences")
            for how in ("captured", "uncaptured")
        ),
        "prompt of 112 tokens",
    }
    assert all(milliseconds > 0 for milliseconds in figures.values())


def test_the_report_names_what_failed_and_the_exit_code_says_so(
    built: SimpleNamespace,
    engine: FakeEngine,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    def no_engine(*_: object) -> None:
        raise CompileError("TensorRT builds no engine: out of memory", hint="use a larger GPU")

    monkeypatch.setattr(engine_check, "targets", lambda *_: [Target("tensorrt-rtx", (89,))])
    monkeypatch.setattr(engine_check, "build", no_engine)
    output = tmp_path / "report.json"
    result = CliRunner().invoke(engine_check.main, [str(built.checkpoint), "--output", str(output)])
    assert result.exit_code == 1
    assert "FAILED" in result.output
    assert "out of memory (use a larger GPU)" in output.read_text()


def test_a_machine_without_a_gpu_is_told_so(monkeypatch: pytest.MonkeyPatch) -> None:
    def no_library(name: str) -> None:
        raise OSError(name)

    monkeypatch.setattr(cuda_module.ctypes, "CDLL", no_library)
    result = CliRunner().invoke(engine_check.main, [str(ROOT)])
    assert result.exit_code == 1
    assert "needs a GPU: no NVIDIA driver is installed (no libcuda.so.1)" in result.output


def test_a_gpu_without_tensorrt_is_told_what_to_install(
    engine: FakeEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("nemotrt.exporter.runtime.backends.installed_version", lambda backend: "")
    result = CliRunner().invoke(engine_check.main, [str(ROOT)])
    assert result.exit_code == 1
    assert "nothing can be built for this GPU" in result.output
    assert "pip install 'nemo-export[rtx]'" in result.output


def test_validate_judges_an_engine(built: SimpleNamespace, engine: FakeEngine, tmp_path: Path) -> None:
    """By PyTorch, by a golden that its graph left, and by another bundle's engine: one path for all."""
    golden = tmp_path / "model.golden"
    by_graph = ValidationRequest(built.bundle, built.checkpoint, save_golden=golden, drift_steps=0)
    assert revalidate(by_graph).passed
    for reference in (
        ValidationRequest(built.bundle, built.checkpoint, engine=True, drift_steps=10),
        ValidationRequest(built.bundle, golden=golden, engine=True),
        ValidationRequest(built.bundle, against=built.bundle, engine=True),
    ):
        before = engine.cuda.launched
        report = revalidate(reference)
        assert report.passed, [gate for gate in report.gates if not gate.passed]
        assert report.candidate == "tensorrt-rtx (TensorRT-RTX 1.7.1 on Fake RTX (SM 89))"
        assert candidates.UNSEEN_ROUTERS in report.not_compared
        assert engine.cuda.launched > before
    assert report.reference == "bundle, tensorrt-rtx (TensorRT-RTX 1.7.1 on Fake RTX (SM 89))"


def test_validate_finds_an_engine_that_errs(
    built: SimpleNamespace, engine: FakeEngine, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    golden = tmp_path / "model.golden"
    revalidate(ValidationRequest(built.bundle, built.checkpoint, save_golden=golden, drift_steps=0))
    make_err(engine, monkeypatch)
    report = revalidate(ValidationRequest(built.bundle, golden=golden, engine=True))
    assert not report.passed
