"""Fields of config.json that other tools leave change nothing; an unknown one is refused, or ignored on request."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from checkpoints import CONFIG, write_checkpoint
from click.testing import CliRunner
from runtime_bundle import write_tokenizer

from nemotrt.exporter.cli import program
from nemotrt.exporter.config import BuildConfig
from nemotrt.exporter.errors import CheckpointError, UsageError
from nemotrt.exporter.pipelines.build import build
from nemotrt.exporter.pipelines.check import check, read_config, read_headers
from nemotrt.exporter.pipelines.quantize import quantize_checkpoint
from nemotrt.exporter.pipelines.validate import revalidate
from nemotrt.exporter.runtime import manifest
from nemotrt.exporter.stages.load import load
from nemotrt.exporter.validation.request import ValidationRequest
from nemotrt.model.config import ModelConfig
from nemotrt.model.config_values import ConfigError

STAMPS: dict[str, Any] = {
    "unsloth_version": "2026.8.1",
    "unsloth_fixed": True,
    "_attn_implementation": "sdpa",
    "gradient_checkpointing": False,
    "use_return_dict": True,
    "router_aux_loss_coef": 0.001,
    "pretraining_tp": 1,
    "temperature": 0.6,
    "tokenizer_class": "PreTrainedTokenizerFast",
    "suppress_tokens": None,
}


def test_stamps_of_other_tools_have_no_effect_and_are_listed() -> None:
    config = ModelConfig.from_dict(CONFIG | STAMPS)
    assert config == ModelConfig.from_dict(CONFIG)
    assert config.inert.keys() >= STAMPS.keys() - {"suppress_tokens"}
    assert config.ignored_fields == ()
    with pytest.raises(ConfigError, match=r"suppress_tokens is \[3\]: no token is forced or forbidden"):
        ModelConfig.from_dict(CONFIG | {"suppress_tokens": [3]})


def with_fields(folder: Path, **fields: Any) -> Path:
    """Add fields to the config.json of a checkpoint."""
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | fields))
    return folder


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    """A checkpoint with two unknown fields."""
    return with_fields(write_checkpoint(tmp_path / "checkpoint"), zeta=1, hyper_connections=[4])


UNKNOWN = ("zeta", "hyper_connections")


def test_unknown_fields_are_named_together_with_a_way_on(checkpoint: Path) -> None:
    with pytest.raises(CheckpointError, match="zeta and hyper_connections are not fields") as refused:
        load(checkpoint)
    assert "--ignore-field zeta --ignore-field hyper_connections" in refused.value.hint
    with pytest.raises(CheckpointError, match=r"config.json: hyper_connections is not a field"):
        load(checkpoint, ignore_fields=["zeta"])


def test_a_bundle_says_which_fields_were_ignored(checkpoint: Path, tmp_path: Path) -> None:
    """It is validated again, with and without its checkpoint, whose config.json has the fields still."""
    out = tmp_path / "bundle"
    result = build(BuildConfig(checkpoint, out, runtime="onnx", layers="3", ignore_fields=UNKNOWN))
    assert manifest.read(out).model.ignored_fields == UNKNOWN
    assert "zeta of config.json is ignored, as requested" in (out / "logs/build.log").read_text()
    expected = "a field of config.json: zeta, ignored as requested"
    assert expected in result.validation.not_compared
    for source in (None, checkpoint):
        report = revalidate(ValidationRequest(out, source))
        assert report.passed
        assert expected in map(str, report.not_compared)
    told = CliRunner().invoke(program, ["inspect", str(out)])
    assert "zeta, hyper_connections of config.json" in told.stdout


def test_check_and_quantize_take_them_too(checkpoint: Path, tmp_path: Path) -> None:
    found = check(read_headers(checkpoint, ignore_fields=UNKNOWN))
    assert found.is_buildable
    assert any("zeta of config.json is ignored" in note for note in found.notes)
    table = {name: ["F32", list(t.shape)] for name, t in read_headers(checkpoint, "", UNKNOWN).stored.items()}
    (tmp_path / "table.json").write_text(json.dumps(table))
    assert read_config(checkpoint / "config.json", tmp_path / "table.json", "", UNKNOWN).config.ignored_fields


def test_a_quantized_checkpoint_keeps_them(tmp_path: Path) -> None:
    checkpoint = with_fields(write_checkpoint(tmp_path / "text", vocab_size=512), zeta=1)
    write_tokenizer(checkpoint)
    text = tmp_path / "text.txt"
    text.write_text("the cat sat on the mat " * 200)
    with pytest.raises(CheckpointError, match="zeta is not a field"):
        quantize_checkpoint(checkpoint, tmp_path / "fp8", calibration=text)
    quantize_checkpoint(checkpoint, tmp_path / "fp8", calibration=text, ignore_fields=["zeta"])
    assert json.loads((tmp_path / "fp8" / "config.json").read_text())["zeta"] == 1
    config = BuildConfig(
        checkpoint,
        tmp_path / "b",
        "fp8",
        runtime="onnx",
        calibration=text,
        ignore_fields=("zeta",),
        validate=False,
    )
    build(config)
    assert manifest.read(tmp_path / "b").model.ignored_fields == ("zeta",)


@pytest.mark.parametrize("name", ["absent", "hidden_size", "rope_theta"])
def test_a_field_that_is_not_unknown_cannot_be_ignored(checkpoint: Path, tmp_path: Path, name: str) -> None:
    names = (*UNKNOWN, name)
    for call in (
        lambda: read_headers(checkpoint, ignore_fields=names),
        lambda: build(BuildConfig(checkpoint, tmp_path / "b", runtime="onnx", ignore_fields=names)),
        lambda: quantize_checkpoint(checkpoint, tmp_path / "q", ignore_fields=names),
    ):
        with pytest.raises(UsageError, match=f"--ignore-field {name} has no effect"):
            call()


def test_an_fp32_residual_is_refused_only_where_it_changes_values(tmp_path: Path) -> None:
    checkpoint = write_checkpoint(tmp_path / "checkpoint", residual_in_fp32=True, torch_dtype="bfloat16")
    for precision, dtype in (("", "BF16"), ("fp16", "FP16"), ("fp8", "BF16")):
        config = BuildConfig(
            checkpoint, tmp_path / "b", precision, runtime="onnx", layers="3", validate=False
        )
        message = f"residual_in_fp32 is true, but the residual of this build is {dtype}"
        with pytest.raises(CheckpointError, match=message) as refused:
            build(config)
        assert "--ignore-field residual_in_fp32" in refused.value.hint
        (problem,) = check(read_headers(checkpoint), precision).problems
        assert str(problem) == str(refused.value)
    assert check(read_headers(checkpoint), "fp32").is_buildable
    result = build(BuildConfig(checkpoint, tmp_path / "fp32", "fp32", runtime="onnx", layers="3"))
    assert result.validation.verdict == "passed"
    names = ("residual_in_fp32",)
    build(
        BuildConfig(
            checkpoint, tmp_path / "b", runtime="onnx", layers="3", ignore_fields=names, validate=False
        )
    )
    assert manifest.read(tmp_path / "b").model.ignored_fields == names
