"""What a build's engines run on is settled before any long work, and what cannot be is refused by name."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from nemotrt.exporter.engines import targets
from nemotrt.exporter.engines.targets import Target, settle
from nemotrt.exporter.errors import CompileError, UsageError
from nemotrt.exporter.runtime import backends
from nemotrt.exporter.runtime.cuda import CudaError, Gpu


@pytest.fixture(autouse=True)
def machine(monkeypatch: pytest.MonkeyPatch) -> dict[str, str]:
    """A machine with both backends and all that links a library; module → its version, changed by a test."""
    versions = {"tensorrt": "11.0.1", "tensorrt_rtx": "1.7.1"}
    monkeypatch.setattr(backends, "installed_version", lambda backend: versions.get(backend.module, ""))
    monkeypatch.setattr(targets, "check_can_link", lambda: None)
    return versions


def gpu(sm: int = 90) -> Gpu:
    return Gpu("Fake GPU", sm, 80 << 30, "13.1")


def no_gpu() -> Gpu:
    raise CudaError("no NVIDIA driver is installed (no libcuda.so.1)")


def settled(runtime: str, sms: tuple[int, ...], precision: str, *, gpu: Callable[[], Gpu]) -> Target:
    """The target on a machine with this GPU."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(targets, "find_gpu", gpu)
        return settle(runtime, sms, precision)


def test_onnx_needs_nothing() -> None:
    assert settled("onnx", (), "fp16", gpu=no_gpu) == Target("onnx")


@pytest.mark.parametrize(
    ("precision", "sms"), [("fp16", (80, 86, 89, 120)), ("bf16", (80, 86, 89, 120)), ("fp8", (89, 120))]
)
def test_rtx_takes_every_generation_that_the_precision_runs_on(precision: str, sms: tuple[int, ...]) -> None:
    assert settled("tensorrt-rtx", (), precision, gpu=no_gpu) == Target("tensorrt-rtx", sms)


def test_sms_are_taken_once_and_in_order() -> None:
    assert settled("tensorrt-rtx", (120, 89, 120), "fp16", gpu=no_gpu).sms == (89, 120)


def test_tensorrt_builds_for_the_machine_s_gpu() -> None:
    assert settled("tensorrt", (), "fp8", gpu=gpu) == Target("tensorrt", (90,))


@pytest.mark.parametrize(
    ("runtime", "sms", "precision", "message", "hint"),
    [
        ("tensorrt-rtx", (90,), "fp16", "TensorRT-RTX builds no engines for SM 90", "--runtime tensorrt "),
        ("tensorrt-rtx", (89, 100), "fp16", "no engines for SM 100", "--sm takes 80, 86, 89, 120"),
        ("tensorrt-rtx", (80,), "fp8", "SM 80 has no FP8 tensor cores", "--precision fp16 or bf16"),
        ("tensorrt-rtx", (75,), "fp16", "there are no kernels for SM 75", "--sm takes 80, 86, 89, 120"),
        ("tensorrt-rtx", (42,), "fp16", "TensorRT-RTX does not know SM 42", "--sm takes 80, 86, 89, 120"),
        ("tensorrt", (90,), "fp16", "--sm goes with --runtime tensorrt-rtx", "leave --sm out"),
        ("onnx", (89,), "fp16", "--sm has no effect with --runtime onnx", "leave one of them out"),
        ("auto", (90,), "fp16", "TensorRT-RTX builds no engines for SM 90", "--runtime tensorrt "),
    ],
)
def test_what_cannot_be_meant_is_a_usage_error(
    runtime: str, sms: tuple[int, ...], precision: str, message: str, hint: str
) -> None:
    with pytest.raises(UsageError, match=message) as caught:
        settled(runtime, sms, precision, gpu=gpu)
    assert hint in caught.value.hint


def test_a_gpu_without_kernels_is_named() -> None:
    with pytest.raises(CompileError, match="Fake GPU: there are no kernels for SM 75"):
        settled("tensorrt", (), "fp16", gpu=lambda: gpu(75))


def test_a_missing_gpu_is_said() -> None:
    with pytest.raises(
        CompileError, match="TensorRT builds engines on a GPU only: no NVIDIA driver"
    ) as caught:
        settled("tensorrt", (), "fp16", gpu=no_gpu)
    assert "--runtime tensorrt-rtx" in caught.value.hint


@pytest.mark.parametrize(
    ("runtime", "module", "extra"),
    [("tensorrt", "tensorrt", "tensorrt"), ("tensorrt-rtx", "tensorrt_rtx", "rtx")],
)
def test_a_missing_package_is_said(machine: dict[str, str], runtime: str, module: str, extra: str) -> None:
    del machine[module]
    with pytest.raises(CompileError, match=f"is not installed .no Python module {module}") as caught:
        settled(runtime, (), "fp16", gpu=gpu)
    assert caught.value.hint == f"pip install 'nemo-export[{extra}]'"


def test_an_old_tensorrt_is_refused(machine: dict[str, str]) -> None:
    machine["tensorrt"] = "10.13.2"
    with pytest.raises(CompileError, match=r"TensorRT 10\.13\.2 is installed, 11 or later is needed"):
        settled("tensorrt", (), "fp16", gpu=gpu)


def test_auto_takes_the_gpu_where_there_is_one() -> None:
    assert settled("auto", (), "fp16", gpu=gpu) == Target("tensorrt", (90,), "", may_fall_back=True)


def test_auto_says_why_it_does_not() -> None:
    target = settled("auto", (), "fp16", gpu=no_gpu)
    assert (target.runtime, target.may_fall_back) == ("tensorrt-rtx", True)
    assert "TensorRT builds engines on a GPU only" in target.why


def test_auto_falls_back_to_the_graph_and_names_all_that_is_missing(machine: dict[str, str]) -> None:
    machine.clear()
    target = settled("auto", (), "fp16", gpu=no_gpu)
    assert (target.runtime, target.sms) == ("onnx", ())
    assert "no Python module tensorrt)" in target.why
    assert "no Python module tensorrt_rtx)" in target.why


def test_auto_with_named_sms_never_falls_back(machine: dict[str, str]) -> None:
    assert settled("auto", (89,), "fp16", gpu=gpu) == Target("tensorrt-rtx", (89,))
    machine.clear()
    with pytest.raises(CompileError, match="TensorRT-RTX is not installed"):
        settled("auto", (89,), "fp16", gpu=gpu)


@pytest.mark.parametrize(("name", "message"), [("triton", "needs Triton"), ("g++", "needs g\\+\\+")])
def test_what_links_the_library_is_named(monkeypatch: pytest.MonkeyPatch, name: str, message: str) -> None:
    monkeypatch.undo()
    monkeypatch.setattr(targets, "find_spec", lambda module: None if module == name else object())
    monkeypatch.setattr(targets.shutil, "which", lambda program: None if program == name else program)
    with pytest.raises(CompileError, match=message):
        targets.check_can_link()
