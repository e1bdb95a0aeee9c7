"""The FP8 KV cache: how a checkpoint asks for one, with or without FP8 weights."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import onnx
import pytest
from checkpoints import write_checkpoint
from fp8_checkpoints import FLOAT8, nano, small
from onnx import TensorProto
from safetensors.torch import load_file

from nemotrt.exporter.checkpoint.weights import read
from nemotrt.exporter.config import BuildConfig
from nemotrt.exporter.errors import CheckpointError, UsageError
from nemotrt.exporter.pipelines.build import build
from nemotrt.exporter.pipelines.check import check, read_headers
from nemotrt.exporter.pipelines.opened_bundle import open_bundle
from nemotrt.exporter.pipelines.validate import revalidate
from nemotrt.exporter.runtime import manifest
from nemotrt.exporter.runtime.graph_file import OnnxGraph
from nemotrt.exporter.stages.load import load
from nemotrt.exporter.validation.request import ValidationRequest
from nemotrt.plugins.contract import DType

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


UNSCALED = "stores no scales for it, so a scale of 1 is used"


def test_a_cache_without_scales_is_said_everywhere(tmp_path: Path) -> None:
    checkpoint = nano(tmp_path / "nano")
    assert [note for note in check(read_headers(checkpoint)).notes if UNSCALED in note]
    # The first four kinds of Nano's layers would take longer than they tell: layers 5 and 6 have attention and experts.
    config = BuildConfig(checkpoint=checkpoint, output=tmp_path / "b", runtime="onnx", layers="5:7")
    result = build(config)
    assert UNSCALED in (tmp_path / "b/logs/build.log").read_text()
    assert [what for what in result.validation.not_compared if UNSCALED in what]


def test_a_published_checkpoint_can_have_a_bf16_cache(tmp_path: Path) -> None:
    checkpoint = nano(tmp_path / "nano")
    bundle = tmp_path / "b"
    config = BuildConfig(checkpoint=checkpoint, output=bundle, runtime="onnx", layers="5:7", kv_dtype="bf16")
    build(config)
    assert UNSCALED not in (bundle / "logs/build.log").read_text()
    graph = onnx.load(bundle / "model.onnx", load_external_data=False)
    types = {value.name: value.type.tensor_type.elem_type for value in graph.graph.input}
    assert types["kv_cache.5"] == TensorProto.BFLOAT16
    report = revalidate(ValidationRequest(bundle, checkpoint))
    assert report.passed
    assert not [entry for entry in report.not_compared if UNSCALED in entry.detail]
    with pytest.raises(UsageError, match="--kv-dtype has no effect"):
        build(dataclasses.replace(config, kv_dtype="fp8", output=tmp_path / "c"))


def test_a_bf16_cache_ignores_the_stored_scales(tmp_path: Path) -> None:
    """A scale of the cache is 1 for all that read it: the graph, PyTorch, a bundle validated by its own weights."""
    bundle, checkpoint = tmp_path / "b", small(tmp_path / "fp8")
    config = BuildConfig(checkpoint=checkpoint, output=bundle, runtime="onnx", layers="2:4", kv_dtype="bf16")
    assert build(config).validation.verdict == "passed"
    graph = OnnxGraph.read(bundle / "model.onnx")
    scales = {tensor.name for tensor in graph.proto.graph.initializer if tensor.name.endswith("_scale")}
    cache_scales = {f"backbone.layers.2.mixer.{name}_scale" for name in "kv"}
    assert cache_scales <= scales
    stored = load_file(checkpoint / "model.safetensors")
    assert all(stored[f"backbone.layers.2.mixer.{name}_proj.{name}_scale"] < 0.1 for name in "kv")
    for source in (None, checkpoint):
        opened = open_bundle(bundle, source)
        assert not opened.model.config.recipe.kv_scales
        for name in cache_scales:
            assert read(opened.model.weights[name], (1,), DType.FLOAT32).item() == 1
        assert revalidate(ValidationRequest(bundle, source)).passed
