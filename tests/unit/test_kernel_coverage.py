"""What no kernel takes is refused by name before anything is written, by a check and by a build for engines."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result

from nemotrt.exporter.checkpoint.side_files import read_config
from nemotrt.exporter.cli import program
from nemotrt.exporter.config import BuildConfig
from nemotrt.exporter.engines import targets
from nemotrt.exporter.engines.kernel_coverage import check_supported, op_calls
from nemotrt.exporter.errors import CompileError
from nemotrt.exporter.runtime import backends
from nemotrt.model.config import ModelConfig
from nemotrt.model.step import pool_specs
from nemotrt.plugins.contract import DType
from nemotrt.plugins.spec import ops
from nemotrt.plugins.variant import SMS

EXAMPLE = Path(__file__).parents[2] / "examples" / "tiny"

NANO = ModelConfig(
    hidden_size=2688,
    vocab_size=131072,
    layers=("mamba", "moe", "attention"),
    mamba_num_heads=64,
    mamba_head_dim=64,
    ssm_state_size=128,
    n_groups=8,
    conv_kernel=4,
    num_attention_heads=32,
    num_key_value_heads=2,
    head_dim=128,
    n_routed_experts=128,
    num_experts_per_tok=6,
    moe_intermediate_size=1856,
)
SUPER = replace(
    NANO,
    hidden_size=4096,
    mamba_num_heads=128,
    n_routed_experts=512,
    num_experts_per_tok=22,
    moe_intermediate_size=2688,
    moe_latent_size=1024,
)


@pytest.fixture(autouse=True)
def machine(monkeypatch: pytest.MonkeyPatch) -> None:
    """A machine that can build engines of TensorRT-RTX."""
    monkeypatch.setattr(backends, "installed_version", lambda backend: "1.7.1")
    monkeypatch.setattr(targets, "check_can_link", lambda: None)


def refusal(
    model: ModelConfig, sms: tuple[int, ...] = SMS, kv_dtype: DType | None = None, **flags: Any
) -> str:
    """Why no engine can be built, or nothing."""
    config = replace(BuildConfig(Path(), Path(), precision="bf16"), **flags)
    dtype = config.dtype
    pools = pool_specs(
        model,
        page_size=config.page_size,
        dtype=dtype,
        state_dtype=config.state,
        kv_dtype=kv_dtype or dtype,
    )
    try:
        check_supported(model, config, pools, sms)
    except CompileError as error:
        return str(error)
    return ""


@pytest.mark.parametrize("precision", ["fp32", "fp16", "bf16"])
@pytest.mark.parametrize(
    "model", [NANO, SUPER, replace(NANO, mamba_head_dim=80), replace(NANO, ssm_state_size=256)]
)
def test_the_family_is_taken_on_every_sm(model: ModelConfig, precision: str) -> None:
    assert refusal(model, precision=precision) == ""


def test_every_op_is_asked_with_all_that_it_wants_to_know() -> None:
    config = BuildConfig(Path(), Path(), precision="bf16")
    pools = pool_specs(NANO, dtype=DType.BFLOAT16, kv_dtype=DType.BFLOAT16)
    calls = {call.op: call for call in op_calls(NANO, config, pools)}
    for spec in ops():
        call = calls.pop(spec.torch_name)
        assert set(call.dtypes) == set(spec.dtypes)
        assert set(call.sizes) <= {*spec.axes, *spec.attributes, "B"}
    assert not calls
    only_attention = replace(NANO, layers=("attention", "mlp"))
    assert [call.op for call in op_calls(only_attention, config, pools)] == ["paged_attention"]


@pytest.mark.parametrize(
    ("change", "flags", "message"),
    [
        ({"conv_kernel": 5}, {}, "NemoCausalConv1d: the kernels require K to be one of 2, 3, 4, got 5"),
        (
            {"ssm_state_size": 64},
            {},
            "NemoSelectiveScan: the kernels require N to be one of 128, 256, got 64",
        ),
        ({"mamba_head_dim": 48}, {}, "NemoSelectiveScan: .* P to be a multiple of 32, or 80 .* got 48 with"),
        (
            {},
            {"state_dtype": "fp16", "precision": "fp32"},
            r"NemoSelectiveScan: .* got \(float32, float16\)",
        ),
        ({"head_dim": 96}, {}, "NemoPagedAttention: the kernels require D to be one of 64, 128, got 96"),
        (
            {"num_key_value_heads": 1},
            {},
            "NemoPagedAttention: .* require Q to be 1 to 16 times V, got Q 32, V 1",
        ),
        ({}, {"page_size": 32}, "NemoPagedAttention: the kernels require page to be one of .*, got 32"),
        ({"moe_intermediate_size": 1850}, {}, "NemoMoeDispatch: .* I to be a multiple of 16, got 1850"),
        (
            {"n_routed_experts": 1024},
            {},
            "NemoMoeDispatch: the kernels require R to be from 1 to 512, got 1024",
        ),
        (
            {"num_experts_per_tok": 40},
            {},
            "NemoMoeDispatch: the kernels require top_k to be from 1 to 32, got 40",
        ),
        ({}, {"max_sequences": 70000, "max_tokens": 70000}, "require B to be from 1 to 65535, got 70000"),
    ],
)
def test_what_no_kernel_takes_is_named(change: dict[str, Any], flags: dict[str, Any], message: str) -> None:
    found = refusal(replace(NANO, **change), **flags)
    assert re.search(rf"^no engine can be built: layers\.\d\.mixer\.\w+: .*{message}", found), found


def test_an_fp8_cache_wants_an_sm_with_fp8() -> None:
    assert refusal(NANO, sms=(89, 120), kv_dtype=DType.FLOAT8_E4M3) == ""
    told = refusal(NANO, sms=(89, 86), kv_dtype=DType.FLOAT8_E4M3)
    assert told.endswith(
        "layers.2.mixer.attention: NemoPagedAttention: SM 86 has no FP8: use a cache of x's dtype, or SM 89 or later"
    )


def run(*arguments: object) -> Result:
    return CliRunner().invoke(program, [str(argument) for argument in arguments])


@pytest.fixture
def odd(tmp_path: Path) -> tuple[Path, Path]:
    """A configuration with heads of 48 columns, and its table of tensors."""
    raw = json.loads((EXAMPLE / "config.json").read_text())
    config = tmp_path / "config.json"
    config.write_text(json.dumps(raw | {"mamba_head_dim": 48}))
    tensors = tmp_path / "tensors.json"
    tensors.write_text("{}")
    assert read_config(tmp_path).mamba_head_dim == 48
    return config, tensors


def test_a_check_says_that_no_kernel_takes_the_model(odd: tuple[Path, Path]) -> None:
    config, tensors = odd
    asked = ("check", "--config", config, "--tensors", tensors, "--json")
    wanted = "no engine can be built: layers.0.mixer.scan: NemoSelectiveScan: the kernels require P to be a multiple"
    result = run(*asked, "--runtime", "tensorrt-rtx", "--sm", "89")
    problems = [problem["message"] for problem in json.loads(result.stdout)["problems"]]
    assert result.exit_code == 3
    assert any(problem.startswith(wanted) for problem in problems), problems
    # Where none was asked for, a build goes on without an engine, and the check says so.
    content = json.loads(run(*asked).stdout)
    assert not any(problem["message"].startswith("no engine") for problem in content["problems"])
    (engine,) = (one for one in content["runtimes"] if one["name"] == "tensorrt-rtx")
    assert not engine["is_built"]
    assert engine["why"].startswith(wanted)


def test_a_check_of_an_engine_that_can_be_built_has_no_problem() -> None:
    result = run("check", EXAMPLE, "--runtime", "tensorrt-rtx", "--sm", "89,120", "--json")
    assert (result.exit_code, json.loads(result.stdout)["problems"]) == (0, [])


@pytest.mark.parametrize(
    ("flags", "told"),
    [
        (("--runtime", "tensorrt-rtx", "--sm", "90"), "TensorRT-RTX builds no engines for SM 90"),
        (("--runtime", "onnx", "--sm", "89"), "--sm has no effect with --runtime onnx"),
    ],
)
def test_a_check_of_what_cannot_be_meant_is_a_usage_error(flags: tuple[str, ...], told: str) -> None:
    result = run("check", EXAMPLE, *flags)
    assert result.exit_code == 2
    assert told in result.stderr


def test_a_build_refuses_before_it_writes(tmp_path: Path) -> None:
    flags = ("--runtime", "tensorrt-rtx", "--sm", "89", "--page-size", "32", "--no-validate")
    result = run("build", EXAMPLE, "--output", tmp_path / "bundle", *flags)
    assert result.exit_code == 5, result.output
    assert (
        "NemoPagedAttention: the kernels require page to be one of 64, 128, 192, 256, got 32" in result.stderr
    )
    assert not list(tmp_path.iterdir())
