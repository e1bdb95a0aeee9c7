from __future__ import annotations

import numpy as np
import onnx
import pytest
import torch

from nemotrt.plugins.contract import DType, LayerName, PoolSpec


@pytest.mark.parametrize("dtype", DType)
def test_every_library_agrees_on_a_dtype(dtype: DType) -> None:
    assert dtype.torch.itemsize == dtype.numpy.itemsize == dtype.itemsize
    assert onnx.helper.tensor_dtype_to_np_dtype(dtype.onnx) == dtype.numpy
    assert DType.lookup("onnx", dtype.onnx) is dtype
    assert DType.from_torch(dtype.torch) is dtype
    assert DType.lookup("safetensors", dtype.safetensors) is dtype


def test_safetensors_itself_uses_these_names(tmp_path) -> None:
    from safetensors.torch import save_file

    for dtype in DType:
        save_file({"x": torch.zeros(8).to(dtype.torch)}, tmp_path / "one.safetensors")
        assert f'"dtype":"{dtype.safetensors}"'.encode() in (tmp_path / "one.safetensors").read_bytes()


def test_an_unknown_dtype_is_refused() -> None:
    with pytest.raises(ValueError, match="F4 is not a known dtype"):
        DType.lookup("safetensors", "F4")


def test_a_pool_knows_its_shape_and_bytes() -> None:
    cache = PoolSpec("kv_cache.7", DType.BFLOAT16, (2, 4, 128, 64))
    state = PoolSpec("ssm_state.0", DType.FLOAT32, (8, 4, 16))
    assert (cache.kind, cache.layer, cache.is_paged, cache.axis, cache.page_size) == (
        "kv_cache",
        7,
        True,
        "K",
        128,
    )
    assert (state.kind, state.layer, state.is_paged, state.axis, state.page_size) == (
        "ssm_state",
        0,
        False,
        "S",
        0,
    )
    assert cache.output == "next.kv_cache.7"
    assert state.shape(5, 9) == (5, 8, 4, 16)
    assert cache.shape(5, 9) == (9, 2, 4, 128, 64)
    assert cache.row_bytes == np.zeros(cache.row_shape, dtype=cache.dtype.numpy).nbytes


@pytest.mark.parametrize(
    ("name", "part", "layer", "inner"),
    [
        ("backbone.layers.7.mixer.in_proj.weight", "layers.7", 7, "mixer.in_proj.weight"),
        ("model.layers.7.norm.weight", "layers.7", 7, "norm.weight"),
        ("layers.12.mixer.scan", "layers.12", 12, "mixer.scan"),
        ("layers.12", "layers.12", 12, ""),
        ("ssm_state.3", "layers.3", 3, "ssm_state"),
        ("next.kv_cache.3", "layers.3", 3, "kv_cache"),
        ("backbone.embeddings.weight", "embeddings", None, "weight"),
        ("embeddings.embedding", "embeddings", None, "embedding"),
        ("backbone.norm_f.weight", "head", None, "weight"),
        ("lm_head.weight", "head", None, "weight"),
        ("head.lm_head", "head", None, "lm_head"),
    ],
)
def test_a_name_says_where_it_belongs(name: str, part: str, layer: int | None, inner: str) -> None:
    assert LayerName.parse(name) == (part, layer, inner)


@pytest.mark.parametrize(
    "name", ["mtp.layers.0.mixer.up_proj.weight", "constant.4", "slot", "layersx.3", "ssm_state"]
)
def test_other_names_belong_nowhere(name: str) -> None:
    assert LayerName.parse(name) is None
