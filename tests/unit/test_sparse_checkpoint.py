"""A published layout as sparse files: it loads, its small tensors have values, and the large ones take no place."""

from __future__ import annotations

import json
import runpy
from pathlib import Path

import pytest
from checkpoints import CONFIG

from nemotrt.exporter.config import BuildConfig
from nemotrt.exporter.pipelines.build import build
from nemotrt.exporter.stages.load import load
from nemotrt.model.checkpoint import tensor_sources
from nemotrt.model.config import ModelConfig

script = runpy.run_path(str(Path(__file__).parents[2] / "scripts" / "make_sparse_checkpoint.py"))
RAW = CONFIG | {"hidden_size": 512, "moe_latent_size": 384, "n_routed_experts": 8, "torch_dtype": "bfloat16"}


@pytest.fixture
def table() -> dict[str, tuple[str, list[int]]]:
    """As published tables are: expert 0 for all, experts and MLPs in FP8 with their scales."""
    found: dict[str, tuple[str, list[int]]] = {}
    for source in tensor_sources(ModelConfig.from_dict(RAW)).values():
        for name in [aliases[0] for aliases in source.names][:1]:
            is_fp8 = ".experts." in name or name.endswith((".up_proj.weight", ".down_proj.weight"))
            found[name] = ("F8_E4M3" if is_fp8 else "BF16", list(source.shape))
            if is_fp8:
                module = name.removesuffix(".weight")
                found |= {f"{module}.{scale}": ("F32", []) for scale in ("weight_scale", "input_scale")}
    return found


@pytest.mark.parametrize("unquantized", [False, True])
def test_it_is_a_checkpoint_that_builds(
    tmp_path: Path, table: dict[str, tuple[str, list[int]]], unquantized: bool
) -> None:
    found = script["write_checkpoint"](
        RAW, table, tmp_path / "sparse", unquantized=unquantized, real=frozenset({1})
    )
    assert 0 < found["bytes_with_values"] < found["bytes"]
    model = load(tmp_path / "sparse")
    assert len(model.weights["backbone.layers.1.mixer.experts.up"].tensors) == RAW["n_routed_experts"]
    config = BuildConfig(
        tmp_path / "sparse",
        tmp_path / "bundle",
        runtime="onnx",
        weights="link",
        validate=False,
        allow_zero_weights=True,
    )
    result = build(config)
    assert result.precision == ("bf16" if unquantized else "fp8")
    index = json.loads((tmp_path / "sparse" / "model.safetensors.index.json").read_text())
    assert len(index["weight_map"]) == found["tensors"]
