"""The FP8 KV cache: how a checkpoint asks for one, with or without FP8 weights."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from checkpoints import write_checkpoint
from fp8_checkpoints import FLOAT8, small

from nemotrt.exporter.config import BuildConfig
from nemotrt.exporter.errors import CheckpointError, UsageError
from nemotrt.exporter.pipelines.build import build
from nemotrt.exporter.pipelines.check import check, read_headers
from nemotrt.exporter.pipelines.validate import revalidate
from nemotrt.exporter.runtime import manifest
from nemotrt.exporter.stages.load import load
from nemotrt.exporter.validation.request import ValidationRequest

CACHE_ALONE = {"quant_algo": None, "kv_cache_quant_algo": "FP8", "exclude_modules": []}


def described(folder: Path, config: dict[str, Any], hf_quant_config: dict[str, Any]) -> Path:
    """A `small` checkpoint whose two descriptions say this about the cache, and the same about weights."""
    small(folder)
    raw = json.loads((folder / "config.json").read_text())
    raw["quantization_config"].pop("kv_cache_scheme")
    excluded = raw["quantization_config"]["ignore"]
    raw["quantization_config"] |= config
    (folder / "config.json").write_text(json.dumps(raw))
    other = {"quant_algo": "FP8", "exclude_modules": excluded} | hf_quant_config
    (folder / "hf_quant_config.json").write_text(json.dumps({"quantization": other}))
    return folder


@pytest.mark.parametrize(
    ("config", "hf_quant_config"),
    [
        ({}, {"kv_cache_quant_algo": "FP8"}),
        ({"kv_cache_scheme": None}, {"kv_cache_quant_algo": "FP8"}),
        ({"kv_cache_scheme": FLOAT8}, {}),
        ({"kv_cache_scheme": FLOAT8}, {"kv_cache_quant_algo": None}),
        ({"kv_cache_scheme": "FP8"}, {"kv_cache_quant_algo": "FP8"}),
        ({"kv_cache_quant_algo": "FP8"}, {}),
    ],
)
def test_one_description_of_the_cache_is_enough(
    tmp_path: Path, config: dict[str, Any], hf_quant_config: dict[str, Any]
) -> None:
    recipe = load(described(tmp_path / "fp8", config, hf_quant_config)).config.recipe
    assert recipe == load(small(tmp_path / "plain")).config.recipe
    assert recipe.kv_cache
    assert recipe.kv_scales


@pytest.mark.parametrize("scheme", ["INT8", {"num_bits": 4, "type": "float", "dynamic": False}])
def test_a_cache_in_another_format_is_named(tmp_path: Path, scheme: Any) -> None:
    folder = described(tmp_path / "fp8", {"kv_cache_scheme": scheme}, {})
    with pytest.raises(
        CheckpointError, match=r"the KV cache is quantized as INT8|must be static 8-bit floats"
    ):
        load(folder)


@pytest.fixture
def cache_alone(tmp_path: Path) -> Path:
    """A checkpoint in BF16 that asks for an FP8 cache."""
    folder = write_checkpoint(tmp_path / "bf16", torch_dtype="bfloat16")
    (folder / "hf_quant_config.json").write_text(json.dumps({"quantization": CACHE_ALONE}))
    return folder


def test_a_cache_can_be_quantized_alone(tmp_path: Path, cache_alone: Path) -> None:
    found = check(read_headers(cache_alone))
    assert (found.is_buildable, found.precision) == (True, "fp8")
    out = tmp_path / "bundle"
    assert build(BuildConfig(cache_alone, out, runtime="onnx", layers="2:4")).validation.verdict == "passed"
    (pool,) = manifest.read(out).graph.pools
    assert pool.dtype == "float8_e4m3fn"
    assert revalidate(ValidationRequest(out)).passed


def test_a_cache_that_was_quantized_alone_can_be_bf16(tmp_path: Path, cache_alone: Path) -> None:
    """Nothing of the model is FP8 then, and nothing is quantized."""
    out = tmp_path / "bundle"
    config = BuildConfig(cache_alone, out, runtime="onnx", layers="2:4", kv_dtype="bf16")
    assert build(config).precision == "bf16"
    assert {pool.dtype for pool in manifest.read(out).graph.pools} == {"bfloat16"}
    assert revalidate(ValidationRequest(out, cache_alone)).passed
    with pytest.raises(UsageError, match="--calibration has no effect: nothing is quantized"):
        build(
            BuildConfig(
                cache_alone, tmp_path / "b", runtime="onnx", kv_dtype="bf16", calibration=Path(__file__)
            )
        )


def test_descriptions_of_nothing_are_refused(tmp_path: Path, cache_alone: Path) -> None:
    nothing = CACHE_ALONE | {"kv_cache_quant_algo": None}
    (cache_alone / "hf_quant_config.json").write_text(json.dumps({"quantization": nothing}))
    with pytest.raises(CheckpointError, match="quantized as a scheme without a name"):
        load(cache_alone)
