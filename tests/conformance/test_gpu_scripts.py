"""The scripts that check and time the kernels on a GPU also run on a CPU, and detect errors."""

from __future__ import annotations

import importlib
import json
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from click.testing import CliRunner
from host_library import library
from torch import Tensor

pytest.importorskip("triton", reason="kernels need Triton: install nemo-export[kernels]")
gpu_check = importlib.import_module("gpu_check")
gpu_bench = importlib.import_module("gpu_bench")
op_cases = importlib.import_module("op_cases")
roofline = importlib.import_module("roofline")

CPU = torch.device("cpu")
STEP = op_cases.Step("mixture", (1, 0, 37, 1), (70, 7, 0, 3), padding=2)
Fault = Callable[[list[Tensor]], object]


def case(op: str, **dtypes: str) -> Any:
    return op_cases.Case(op, op_cases.TOY, STEP, tuple(dtypes.items()))


CONV = case("causal_conv1d", X="float16")
SCAN = case("selective_scan", X="float16", STATE="float32")
ATTENTION = case("paged_attention", X="float16", CACHE="float16")
EXPERTS = case("moe_dispatch", X="float16", W="float16")


def failure(case: Any, fault: Fault) -> str:
    """The check's message for the reference with an error in its outputs."""

    def run(*inputs: Tensor, **attributes: Any) -> tuple[Tensor, ...]:
        outputs = [output.clone() for output in case.spec.reference()(*inputs, **attributes)]
        fault(outputs)
        return tuple(outputs)

    return gpu_check.check(case, run, CPU, seed=1).failure  # type: ignore[no-any-return]


@pytest.mark.parametrize("case", [CONV, SCAN, ATTENTION, EXPERTS], ids=lambda case: case.op)
def test_the_reference_itself_passes(case: Any) -> None:
    assert failure(case, lambda outputs: None) == ""


def first_pool_row_without_tokens(outputs: list[Tensor]) -> Tensor:
    slots = SCAN.inputs(CPU, 1)[-1].tolist()
    return outputs[1][slots[1]]


@pytest.mark.parametrize(
    ("case", "fault", "told"),
    [
        (CONV, lambda o: o[0].mul_(1.002), "beyond the tolerance"),
        (CONV, lambda o: o[0][5].mul_(1.0055), "a row's error is beyond 5 times the tolerance"),
        (CONV, lambda o: o[0][5, 3].fill_(torch.nan), "y: 1 values are not finite"),
        (CONV, lambda o: o[0][39].fill_(1e-7), "y: padding tokens are not zero"),
        (CONV, lambda o: o[0].copy_(torch.empty_like(o[0])), "y: 15744 values are not finite"),
        (CONV, lambda o: o[1][1].view(torch.int16)[0, 0].bitwise_xor_(1), "the pool's bits are not"),
        (ATTENTION, lambda o: o[1][2].view(torch.int16)[0, 0, 1].bitwise_xor_(1), "the pool's bits are not"),
        (SCAN, lambda o: first_pool_row_without_tokens(o).zero_(), "a sequence without tokens changed"),
        (SCAN, lambda o: o[1].mul_(1.01), "next_ssm_state: the state of a sequence without tokens changed"),
        (EXPERTS, lambda o: o[0].mul_(1.005), "beyond the tolerance"),
    ],
)
def test_a_fault_is_told(case: Any, fault: Fault, told: str) -> None:
    assert told in failure(case, fault)


def test_the_scratch_row_is_nobodys() -> None:
    assert failure(CONV, lambda o: o[1][0].fill_(torch.inf)) == ""


def test_runs_that_differ_are_told() -> None:
    calls = iter(range(9))
    told = failure(CONV, lambda o: o[0].view(torch.int16)[0, 0].bitwise_xor_(next(calls) & 1))
    assert told == "CheckFailed: y: two runs gave different bits"


def test_what_a_run_raises_is_told() -> None:
    def raising(_: list[Tensor]) -> None:
        raise ValueError("NemoCausalConv1d: no\nmore")

    assert failure(CONV, raising) == "ValueError: NemoCausalConv1d: no"


def test_a_zero_reference_is_no_pass() -> None:
    with pytest.raises(gpu_check.CheckFailed, match="nothing was compared"):
        gpu_check.error_of(torch.zeros(2, 3), torch.zeros(2, 3))


@pytest.mark.parametrize("op", list(op_cases.DTYPES))
def test_the_check_runs_in_the_interpreter(op: str, tmp_path: Path) -> None:
    output = tmp_path / "check.json"
    arguments = ["--interpret", "--op", op, "--match", "padded decode", "--output", str(output)]
    result = CliRunner().invoke(gpu_check.main, arguments, catch_exceptions=False)
    assert result.exit_code == 0, result.output
    content = json.loads(output.read_text())
    assert content["device"] == "Triton's interpreter on a CPU"
    assert len(content["results"]) == len(op_cases.DTYPES[op])
    assert all(found["error"] <= found["tolerance"] for found in content["results"])


@pytest.mark.parametrize("op", list(op_cases.DTYPES))
def test_the_bench_runs_in_the_interpreter(op: str, tmp_path: Path) -> None:
    output = tmp_path / "bench.json"
    arguments = ["--interpret", "--op", op, "--match", "decode", "--output", str(output)]
    result = CliRunner().invoke(gpu_bench.main, arguments, catch_exceptions=False)
    assert result.exit_code == 0, result.output
    assert "the interpreter's times are meaningless" in result.output
    for found in json.loads(output.read_text())["results"]:
        assert found["launches"] >= 1
        for peer, took in found["peers"].items():
            assert isinstance(took, float) or took == "missing: it needs a GPU", (peer, took)


def test_without_a_gpu_nothing_is_claimed(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    for script in (gpu_check, gpu_bench):
        result = CliRunner().invoke(script.main, ["--output", str(tmp_path / "result.json")])
        assert result.exit_code == 1
        assert "there is no CUDA GPU" in result.output
    assert not list(tmp_path.iterdir())


def test_a_peer_that_differs_is_not_timed() -> None:
    case = op_cases.Case("causal_conv1d", op_cases.TOY, op_cases.prefill(4), (("X", "float32"),))
    inputs = case.inputs(CPU, 0)
    outputs = case.spec.reference()(*inputs)
    sets = [gpu_bench.Prepared({}, outputs, [])]
    peers = importlib.import_module("peers")

    def time(call: Callable[[], Tensor]) -> float | str:
        peer = peers.Peer("peer", lambda *_: call)
        return gpu_bench.time_peer(peer, case, sets, CPU)  # type: ignore[no-any-return]

    assert isinstance(time(lambda: outputs[0] * 1.001), float)
    assert time(lambda: outputs[0] * 2) == "its output differs from ours: relative L2 1.0e+00"
    assert time(lambda: torch.ones(2) @ torch.ones(3)).startswith("failed: RuntimeError")  # type: ignore[union-attr]


class TestCounts:
    """Counts at Super's sizes equal figures computed by hand."""

    def count(self, op: str, step: Any, **dtypes: str) -> Any:
        found = op_cases.Case(op, op_cases.SUPER, step, tuple(dtypes.items()))
        return found.count([])

    def test_scan_prefill(self) -> None:
        count = self.count("selective_scan", op_cases.prefill(8192), X="bfloat16", STATE="float32")
        assert count.num_bytes == 8192 * (2 * 8192 + 2 * 1024 + 128) * 2 + 128 * 64 * 128 * 4
        chunks = 8192 // 128
        products = 8 * 128 * 128 * 128 + 128 * (128 * 128 * 64 + 2 * 128 * 64 * 128)
        assert count.flops == 2 * chunks * products

    def test_scan_decode_reads_and_writes_each_state(self) -> None:
        count = self.count("selective_scan", op_cases.decode(64, 8191), X="bfloat16", STATE="float32")
        assert count.num_bytes == 64 * (2 * 128 * 64 * 128 * 4 + (2 * 8192 + 2 * 1024 + 128) * 2)

    def test_attention(self) -> None:
        prefill = self.count("paged_attention", op_cases.prefill(8192), X="bfloat16", CACHE="bfloat16")
        assert prefill.flops == 4 * 32 * 128 * 8192 * 8193 / 2
        assert prefill.num_bytes == 8192 * 128 * 2 * (2 * 32 + 2 * 2 + 2 * 2)
        decode = self.count("paged_attention", op_cases.decode(64, 8191), X="bfloat16", CACHE="float8_e4m3fn")
        assert decode.num_bytes == 64 * (2 * 8192 * 2 * 128 + 128 * 2 * (2 * 32 + 2 * 2))

    def test_conv(self) -> None:
        count = self.count("causal_conv1d", op_cases.decode(64, 8191), X="bfloat16")
        assert count.num_bytes == 10240 * 2 * (64 * 2 + 5 + 64 * 2 * 3)

    def test_experts_stream_the_weights_that_are_chosen(self) -> None:
        count = roofline.experts(T=1, distinct=22, L=1024, I=2688, k=22, x=2, weight=1)
        assert count.flops == 22 * 4 * 1024 * 2688
        assert count.num_bytes == pytest.approx(22 * 2 * 1024 * 2688, rel=2e-3)

    def test_the_bound_is_the_slower_of_the_two(self) -> None:
        assert roofline.Count(8.0, 4.0).bound(peak=2.0, bandwidth=2.0) == 4.0
        assert roofline.Count(8.0, 4.0).bound(peak=float("inf"), bandwidth=2.0) == 2.0


@pytest.mark.parametrize("op", list(op_cases.DTYPES))
def test_without_a_gpu_the_library_goes_up_to_the_launch(op: str, tmp_path: Path) -> None:
    output = tmp_path / "check.json"
    arguments = ["--interpret", "--op", op, "--library", str(library().path), "--output", str(output)]
    result = CliRunner().invoke(gpu_check.main, arguments, catch_exceptions=False)
    assert result.exit_code == 0, result.output
    content = json.loads(output.read_text())
    assert content["library"]["hash"] == library().description["hash"]
    found = content["results"]
    assert len(found) == 2 * len(op_cases.DTYPES[op])
    for one in found:
        assert one["error"] is None
        assert "launches for SM 120 found, none executed: there is no GPU" in one["not_run"]
    assert f"0 of {len(found)} pass" in result.output
    assert f"{len(found)} were only checked up to the launch" in result.output


def test_a_library_without_the_kernels_fails() -> None:
    found = gpu_check.check_up_to_launch(CONV, library(), 75, seed=1)
    assert found.failure.startswith("PluginError: NemoCausalConv1d")
    assert not found.not_run


def test_a_file_that_is_no_library_is_named(tmp_path: Path) -> None:
    (tmp_path / "x.so").write_text("no")
    arguments = ["--interpret", "--library", str(tmp_path / "x.so"), "--output", str(tmp_path / "out.json")]
    result = CliRunner().invoke(gpu_check.main, arguments)
    assert result.exit_code == 1
    assert "x.so cannot be loaded" in result.output


def test_the_plugin_library_is_what_is_checked(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """With a library that is wrong in one op, only that op fails."""

    def run_faulty(_: object, spec: Any, *inputs: Tensor, **attributes: Any) -> tuple[Tensor, ...]:
        first, *pools = spec.reference()(*inputs, **attributes)
        return (first + (spec.torch_name == "causal_conv1d"), *pools)

    monkeypatch.setattr(gpu_check, "chosen_device", lambda interpret: CPU)
    monkeypatch.setattr(gpu_check, "device_sm", lambda device: 80)
    monkeypatch.setattr(
        gpu_check, "plugin_library", lambda sm, path: SimpleNamespace(description={"hash": "faulty"})
    )
    monkeypatch.setattr(gpu_check, "run_plugin", run_faulty)
    monkeypatch.setattr(gpu_check, "chosen_cases", lambda full, sm: [CONV, SCAN])
    output = tmp_path / "found.json"
    result = CliRunner().invoke(gpu_check.main, ["--plugins", "--seed", "1", "--output", str(output)])
    assert result.exit_code == 1
    found = json.loads(output.read_text())
    assert found["library"] == {"hash": "faulty"}
    assert [bool(one["failure"]) for one in found["results"]] == [True, False]
