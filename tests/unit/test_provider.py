"""validate --provider: the graph on CUDA in ONNX Runtime. No GPU is here: a CPU stands in, or is refused."""

from __future__ import annotations

from pathlib import Path

import onnxruntime as ort
import pytest
from checkpoints import write_checkpoint

from nemotrt.exporter.config import BuildConfig
from nemotrt.exporter.errors import UsageError
from nemotrt.exporter.pipelines import build
from nemotrt.exporter.pipelines.validate import revalidate
from nemotrt.exporter.runtime import graph_file
from nemotrt.exporter.validation.candidates import PARTS_ON_CPU
from nemotrt.exporter.validation.request import ValidationRequest


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("provider")
    checkpoint = write_checkpoint(folder / "checkpoint")
    config = BuildConfig(checkpoint, folder / "bundle", "fp32", runtime="onnx", validate=False)
    build.build(config)
    return folder / "bundle"


def test_cuda_is_refused_where_onnx_runtime_has_none(bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ort, "get_available_providers", lambda: [graph_file.CPU])
    with pytest.raises(UsageError, match="this ONNX Runtime has no CUDAExecutionProvider"):
        revalidate(ValidationRequest(bundle, provider="cuda", drift_steps=0))


def test_the_report_says_what_ran_on_cuda(bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    opened: list[tuple[str, ...]] = []
    create = ort.InferenceSession

    def on_the_cpu(*arguments, providers, **options):  # type: ignore[no-untyped-def]
        opened.append(tuple(providers))
        return create(*arguments, providers=[graph_file.CPU], **options)

    monkeypatch.setattr(ort, "get_available_providers", lambda: [*graph_file.PROVIDERS["cuda"]])
    monkeypatch.setattr(ort, "InferenceSession", on_the_cpu)
    report = revalidate(ValidationRequest(bundle, provider="cuda", drift_steps=2))
    assert report.candidate == "ONNX Runtime on CUDA (FP32)"
    assert report.passed
    assert PARTS_ON_CPU in report.not_compared
    # Two ways and the drift on CUDA, and each part on the CPU.
    assert opened.count(graph_file.PROVIDERS["cuda"]) == 5  # two modes at two pool sizes, and the long decode
    assert set(opened) == set(graph_file.PROVIDERS.values())
