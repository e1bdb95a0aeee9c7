"""Bisecting an engine: its parts are built and run on a fake TensorRT and CUDA, which compute in ONNX Runtime."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import onnxruntime as ort
import pytest
from fake_gpu import ENGINE, LIBRARY, VERSION, FakeCuda, FakeEngine, add_engine, fake_module
from faults import broken
from faults.weights import dropped_skip, swapped_kv_heads

from nemotrt.exporter.config import BuildConfig
from nemotrt.exporter.engines.builder import EngineRequest, EngineResult
from nemotrt.exporter.errors import BundleError, UsageError
from nemotrt.exporter.pipelines import build, validate
from nemotrt.exporter.pipelines.validate import trace_for_bisection
from nemotrt.exporter.progress import SILENT
from nemotrt.exporter.report.model import Gate, ValidationReport
from nemotrt.exporter.runtime import cuda as cuda_module
from nemotrt.exporter.runtime import engine_session
from nemotrt.exporter.runtime import manifest as manifests
from nemotrt.exporter.runtime.graph_file import OnnxGraph
from nemotrt.exporter.stages.load import load
from nemotrt.exporter.validation.parts import engine_parts
from nemotrt.exporter.validation.parts.bisection import bisect
from nemotrt.exporter.validation.parts.engine_parts import EngineParts
from nemotrt.exporter.validation.parts.part_run import mixed_steps
from nemotrt.exporter.validation.plan import workload_of
from nemotrt.exporter.validation.request import ValidationRequest


@pytest.fixture(scope="module")
def built(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, BuildConfig]:
    output = tmp_path_factory.mktemp("parts") / "bundle"
    config = BuildConfig(checkpoint, output, precision="fp32", runtime="onnx", validate=False)
    build.build(config)
    add_engine(output, config)
    return output, config


@pytest.fixture
def cuda(monkeypatch: pytest.MonkeyPatch) -> FakeCuda:
    fake = FakeCuda()
    monkeypatch.setattr(cuda_module.ctypes, "CDLL", lambda name: fake)
    return fake


@pytest.fixture
def requests(cuda: FakeCuda, monkeypatch: pytest.MonkeyPatch) -> list[EngineRequest]:
    """What the builder was asked for; each request becomes the engine that is loaded next."""
    asked: list[EngineRequest] = []

    def run_builder(request: EngineRequest, backend: object) -> EngineResult:
        asked.append(request)
        Path(request.output).write_bytes(b"stand-in")
        pools = dict(zip(request.pools[::2], request.pools[1::2], strict=True))
        engine = FakeEngine(cuda, ort.InferenceSession(request.graph), request.profiles, pools)  # type: ignore[arg-type]
        monkeypatch.setattr(engine_session, "load_module", lambda backend: fake_module(VERSION, engine))
        return EngineResult(VERSION)

    def session_beside_links(request: EngineRequest, backend: object) -> EngineResult:
        # ONNX Runtime takes no linked data; TensorRT's builder maps it.
        for link in Path(request.graph).parent.iterdir():
            if link.is_symlink():
                target = link.resolve()
                link.unlink()
                shutil.copyfile(target, link)
        return run_builder(request, backend)

    monkeypatch.setattr(engine_parts, "run_builder", session_beside_links)
    return asked


def opened(bundle: Path, config: BuildConfig) -> tuple[EngineParts, Any, Any]:
    model = load(config.checkpoint)
    driven = workload_of(model, config, 0)
    parts = EngineParts(bundle, manifests.read(bundle), mixed_steps(driven), driven)
    return parts, model, driven


def test_an_engine_is_bisected_part_by_part(
    built: tuple[Path, BuildConfig], requests: list[EngineRequest], tmp_path: Path, cuda: FakeCuda
) -> None:
    bundle = shutil.copytree(built[0], tmp_path / "bundle")
    graph = bundle / "model.onnx"
    broken(graph, dropped_skip)
    broken(graph, swapped_kv_heads)
    parts, model, driven = opened(bundle, built[1])
    traces = trace_for_bisection(model, built[1])
    bisected = bisect(model, built[1], OnnxGraph.read(graph), driven, *traces, open_part=parts.open)
    assert [value.node for value in bisected.diverging] == ["layers.0.mixer.scan", "layers.2.mixer.k_proj"]
    assert bisected.runs_as == f"TensorRT-RTX {VERSION} on Fake RTX (SM 89), part by part"
    assert not bisected.marking_changed
    # Each part with its inner values as outputs, and without.
    assert len(requests) == 2 * 8
    mamba = requests[2]
    assert mamba.plugins == ["layers.0.mixer.conv", "layers.0.mixer.scan"]
    assert mamba.pools == ["conv_state.0", "next.conv_state.0", "ssm_state.0", "next.ssm_state.0"]
    assert mamba.profiles[0]["query_start"] == [[3], [5], [5]]
    assert (mamba.sms, mamba.library) == ([89], str(bundle / LIBRARY))
    assert not Path(mamba.graph).exists()


def test_validate_bisects_the_engine_that_it_judges(
    built: tuple[Path, BuildConfig], requests: list[EngineRequest]
) -> None:
    request = ValidationRequest(built[0], built[1].checkpoint, engine=True, bisect=True)
    subject = validate.open_bundle(built[0], built[1].checkpoint, None)
    report = ValidationReport("engine", "PyTorch", "", {}, (Gate("s", "o", "m", 0.0, 1.0),), {}, ())
    found = validate._bisected(report, request, subject, SILENT)
    assert found.bisect
    assert "Fake RTX" in found.bisect.runs_as
    assert found.passed
    assert requests


def test_a_part_that_fails_on_the_gpu_is_said(
    built: tuple[Path, BuildConfig], requests: list[EngineRequest], cuda: FakeCuda
) -> None:
    parts, model, driven = opened(*built)
    traces, graph = trace_for_bisection(model, built[1]), OnnxGraph.read(built[0] / "model.onnx")
    cuda.failing = "cuMemAlloc_v2"
    with pytest.raises(BundleError, match="no room"):
        bisect(model, built[1], graph, driven, *traces, open_part=parts.open)


def test_a_changed_library_runs_nothing(
    built: tuple[Path, BuildConfig], requests: list[EngineRequest], tmp_path: Path
) -> None:
    bundle = shutil.copytree(built[0], tmp_path / "bundle")
    (bundle / LIBRARY).write_bytes(b"another!")
    with pytest.raises(BundleError, match="was changed after it was built"):
        opened(bundle, built[1])
    assert not requests
    assert (bundle / ENGINE).exists()


def test_without_a_gpu_it_is_refused(built: tuple[Path, BuildConfig]) -> None:
    with pytest.raises(UsageError, match="on a GPU"):
        opened(*built)
