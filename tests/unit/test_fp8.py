"""FP8 checkpoints: taken bit for bit, quantized as the reference says, and refused by name where they are not FP8."""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
import pytest
import torch
from fp8_checkpoints import NANO_BF16, description, lowered, nano, small, super_
from onnx import TensorProto
from safetensors.torch import load_file, save_file

from nemotrt.exporter.checkpoint.quant_config import parse_description, pattern_matcher
from nemotrt.exporter.config import BuildConfig
from nemotrt.exporter.errors import CheckpointError, UsageError
from nemotrt.exporter.pipelines import build
from nemotrt.exporter.pipelines.check import check, read_headers
from nemotrt.exporter.runtime.fp32_emulation import emulate_in_fp32
from nemotrt.exporter.runtime.graph_file import OnnxGraph
from nemotrt.exporter.stages.load import load
from nemotrt.exporter.validation.candidates import graph_candidate
from nemotrt.exporter.validation.validate import validate
from nemotrt.model.config import ModelConfig
from nemotrt.model.fp8 import fp8_linear
from nemotrt.plugins.e4m3 import from_e4m3

TINY = Path(__file__).resolve().parents[2] / "examples" / "tiny"
IN_PROJ = "backbone.layers.0.mixer.in_proj"
EXPERT = "backbone.layers.1.mixer.experts.3.up_proj"


def raw(graph: Path) -> dict[str, tuple[int, bytes]]:
    """Each initialiser's type and bytes, as they lie in the file."""
    model = onnx.load(graph)
    return {tensor.name: (tensor.data_type, tensor.raw_data) for tensor in model.graph.initializer}


def bits(tensor: torch.Tensor) -> bytes:
    return (
        tensor.contiguous().view(torch.uint8).numpy().tobytes() if tensor.ndim else tensor.numpy().tobytes()
    )


@pytest.mark.parametrize("layout", [nano, super_])
def test_a_published_layout_keeps_every_bit_of_weights_and_scales(
    tmp_path: Path, layout: Callable[[Path], Path]
) -> None:
    checkpoint = layout(tmp_path / "published")
    stored = load_file(checkpoint / "model.safetensors")
    graph, _ = lowered(checkpoint, tmp_path)
    found = raw(graph)
    seen = Counter[tuple[str, str]]()
    for name, tensor in stored.items():
        kind = name.rpartition(".")[2]
        if ".experts." in name or name.startswith("mtp."):
            continue
        if kind in ("k_scale", "v_scale"):
            assert found[name.replace("k_proj.", "").replace("v_proj.", "")][1] == bits(tensor), name
        elif tensor.dtype == torch.float8_e4m3fn:
            assert found[name] == (TensorProto.FLOAT8E4M3FN, bits(tensor)), name
        elif kind in ("weight_scale", "input_scale"):
            assert found[name] == (TensorProto.FLOAT, bits(tensor)), name
        elif name.endswith("_proj.weight"):
            assert found[name] == (TensorProto.BFLOAT16, bits(tensor)), name
        else:
            continue
        seen[kind, str(tensor.dtype)] += 1
    layers = ModelConfig.from_dict(json.loads((checkpoint / "config.json").read_text())).layers
    assert seen == expected_counts(layers, scaled=layout is super_)
    for i in (i for i, kind in enumerate(layers) if kind == "moe"):
        prefix = f"backbone.layers.{i}.mixer.experts"
        for own, projection, activation in (("up", "up_proj", "input"), ("down", "down_proj", "hidden")):
            each = [f"{prefix}.{expert}.{projection}" for expert in range(4)]
            assert found[f"{prefix}.{own}"] == (
                TensorProto.FLOAT8E4M3FN,
                b"".join(bits(stored[f"{name}.weight"]) for name in each),
            )
            # One scale an expert, for each of its outputs.
            scales = (bits(stored[f"{name}.weight_scale"]) * len(stored[f"{name}.weight"]) for name in each)
            assert found[f"{prefix}.{own}_scale"][1] == b"".join(scales)
            largest = max(stored[f"{name}.input_scale"] for name in each)
            assert found[f"{prefix}.{activation}_scale"][1] == bits(largest)


def expected_counts(layers: tuple[str, ...], *, scaled: bool) -> dict[tuple[str, str], int]:
    """How many tensors of each kind beside the experts' own a published layout has, in FP8 and not."""
    mamba, moe, attention = (layers.count(kind) for kind in ("mamba", "moe", "attention"))
    plain_mamba = 0 if scaled else len(NANO_BF16)
    fp8 = 2 * (mamba - plain_mamba) + 2 * moe
    fp32 = dict.fromkeys(("weight_scale", "input_scale"), fp8)
    fp32 |= dict.fromkeys(("k_scale", "v_scale"), attention) if scaled else {}
    plain = 2 * plain_mamba + 4 * attention + (2 * moe if scaled else 0)
    return {
        ("weight", "torch.float8_e4m3fn"): fp8,
        ("weight", "torch.bfloat16"): plain,
        **{(name, "torch.float32"): count for name, count in fp32.items()},
    }


def rescaled(folder: Path, *, per_channel: bool, ones: int) -> Path:
    """`small` with a scale for each output of a weight, or one of it; of so many sizes of 1 at its end."""
    file = small(folder) / "model.safetensors"
    generator = torch.Generator().manual_seed(2)
    tensors = load_file(file)
    for name in tensors:
        if per_channel and name.endswith(".weight_scale"):
            weight = tensors[name.removesuffix("_scale")]
            tensors[name] = torch.rand(len(weight), generator=generator) * 0.01 + 1e-4
        if name.endswith("_scale"):
            tensors[name] = tensors[name].reshape([*tensors[name].shape, *[1] * ones])
    save_file(tensors, file)
    return folder


def test_an_expert_may_have_a_scale_for_each_output(tmp_path: Path) -> None:
    checkpoint = rescaled(tmp_path / "fp8", per_channel=True, ones=0)
    stored = load_file(checkpoint / "model.safetensors")
    graph, config = lowered(checkpoint, tmp_path)
    found = raw(graph)
    for layer in (1, 5):
        prefix = f"backbone.layers.{layer}.mixer.experts"
        for own in ("up", "down"):
            each = [bits(stored[f"{prefix}.{expert}.{own}_proj.weight_scale"]) for expert in range(4)]
            assert found[f"{prefix}.{own}_scale"][1] == b"".join(each)
    report = validate(load(config.checkpoint), config, graph_candidate(OnnxGraph.read(graph)))
    assert [gate for gate in report.gates if not gate.passed] == []


@pytest.mark.parametrize("per_channel", [False, True])
def test_sizes_of_1_at_the_end_of_a_scale_mean_nothing(tmp_path: Path, per_channel: bool) -> None:
    graphs = []
    for ones in (0, 1):
        folder = tmp_path / str(ones)
        graphs.append(lowered(rescaled(folder / "fp8", per_channel=per_channel, ones=ones), folder)[0])
    assert raw(graphs[0]) == raw(graphs[1])


def test_a_linear_is_what_tensorrt_fuses(tmp_path: Path) -> None:
    graph, _ = lowered(small(tmp_path / "fp8"), tmp_path)
    model = onnx.load(graph, load_external_data=False)
    made_by = {name: node for node in model.graph.node for name in node.output}
    gemm = next(node for node in model.graph.node if node.name == "layers.0.mixer.in_proj")
    x, weight = (made_by[name] for name in gemm.input[:2])
    assert [x.op_type, weight.op_type] == ["DequantizeLinear"] * 2
    assert made_by[x.input[0]].op_type == "QuantizeLinear"
    assert list(weight.input) == [f"{IN_PROJ}.weight", f"{IN_PROJ}.weight_scale"]
    assert made_by[x.input[0]].input[1] == x.input[1] == f"{IN_PROJ}.input_scale"
    types = {tensor.name: tensor.data_type for tensor in model.graph.initializer}
    assert types["lm_head.weight"] == TensorProto.BFLOAT16
    assert types["backbone.layers.1.mixer.gate.weight"] == TensorProto.FLOAT
    caches = [value for value in model.graph.input if value.name == "kv_cache.2"]
    assert [value.type.tensor_type.elem_type for value in caches] == [TensorProto.FLOAT8E4M3FN]


def test_the_graph_is_the_fake_quantized_reference(tmp_path: Path) -> None:
    graph, config = lowered(small(tmp_path / "fp8"), tmp_path)
    report = validate(load(config.checkpoint), config, graph_candidate(OnnxGraph.read(graph)))
    failed = [gate for gate in report.gates if not gate.passed]
    assert not failed
    assert "FP8" in report.candidate
    assert [layer.kind for layer in report.layers] == list(load(config.checkpoint).config.layers)
    assert all(layer.baseline and layer.error <= 3 * layer.baseline for layer in report.layers)


def test_a_forgotten_scale_is_caught(tmp_path: Path) -> None:
    graph, config = lowered(small(tmp_path / "fp8"), tmp_path)
    model = onnx.load(graph)
    scale = next(t for t in model.graph.initializer if t.name == f"{IN_PROJ}.weight_scale")
    scale.raw_data = (np.frombuffer(scale.raw_data, np.float32) * np.float32(1.1)).tobytes()
    onnx.save(model, tmp_path / "wrong.onnx")
    report = validate(
        load(config.checkpoint), config, graph_candidate(OnnxGraph.read(tmp_path / "wrong.onnx"))
    )
    assert not report.passed


@pytest.mark.parametrize("per_channel", [False, True])
def test_a_linear_in_onnx_runtime_is_the_reference(per_channel: bool) -> None:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(5, 8, generator=generator) * 3
    weight = torch.randn(6, 8, generator=generator).to(torch.float8_e4m3fn)
    scale = torch.rand(6 if per_channel else (), generator=generator) * 0.1 + 0.01
    input_scale = torch.tensor(0.01)  # most of x saturates
    expected = fp8_linear(x, weight, scale, input_scale, None)
    helper = onnx.helper
    axis = {"axis": 0} if per_channel else {}
    nodes = [
        helper.make_node("QuantizeLinear", ["x", "s"], ["q"], output_dtype=TensorProto.FLOAT8E4M3FN),
        helper.make_node("DequantizeLinear", ["q", "s"], ["xd"], output_dtype=TensorProto.FLOAT),
        helper.make_node("DequantizeLinear", ["w", "ws"], ["wd"], output_dtype=TensorProto.FLOAT, **axis),
        helper.make_node("Gemm", ["xd", "wd"], ["y"], transB=1),
    ]
    graph = helper.make_graph(
        nodes,
        "linear",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, [5, 8])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, [5, 6])],
        [
            helper.make_tensor("w", TensorProto.FLOAT8E4M3FN, [6, 8], bits(weight), raw=True),
            helper.make_tensor("ws", TensorProto.FLOAT, list(scale.shape), bits(scale), raw=True),
            helper.make_tensor("s", TensorProto.FLOAT, [], bits(input_scale), raw=True),
        ],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 23)], ir_version=10)
    session = ort.InferenceSession(
        emulate_in_fp32(model).SerializeToString(), providers=["CPUExecutionProvider"]
    )
    (seen,) = session.run(None, {"x": x.numpy()})
    assert np.linalg.norm(seen - expected.numpy()) <= 1e-6 * np.linalg.norm(expected.numpy())


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        (f"{IN_PROJ}.weight_scale", None, f"{IN_PROJ}.weight_scale is missing"),
        (f"{EXPERT}.input_scale", None, f"{EXPERT}.input_scale is missing"),
        ("backbone.layers.2.mixer.k_proj.k_scale", None, "k_scale is missing"),
        (f"{IN_PROJ}.weight", torch.zeros(1), f"{IN_PROJ}.weight has shape [1]"),
        (f"{IN_PROJ}.weight_scale", torch.ones(3, 2), f"{IN_PROJ}.weight_scale has shape [3, 2]"),
        (f"{EXPERT}.weight_scale", torch.ones(24), f"{EXPERT}.weight_scale has shape [24], but the"),
    ],
)
def test_what_is_not_there_is_named(
    tmp_path: Path, name: str, value: torch.Tensor | None, message: str
) -> None:
    with pytest.raises(CheckpointError, match=re.escape(message)):
        load(small(tmp_path / "fp8", **{name: value}))


def with_description(folder: Path, said: Any) -> Path:
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"quantization_config": said}))
    return folder


def test_a_quantized_module_that_is_said_not_to_be(tmp_path: Path) -> None:
    folder = with_description(
        small(tmp_path / "fp8"), description(["*.in_proj", "backbone.layers.2*", "*latent*"])
    )
    with pytest.raises(
        CheckpointError, match=r"in_proj.weight is stored as float8_e4m3fn, but .* says it is not quantized"
    ):
        load(folder)


def test_a_plain_module_that_is_said_to_be_quantized(tmp_path: Path) -> None:
    folder = with_description(small(tmp_path / "fp8"), description(["*latent*"]))
    with pytest.raises(CheckpointError, match=r"q_proj.weight is stored as bfloat16, but .* says it is FP8"):
        load(folder)


def test_two_descriptions_must_agree(tmp_path: Path) -> None:
    folder = small(tmp_path / "fp8")
    said = {
        "quantization": {"quant_algo": "FP8", "kv_cache_quant_algo": "FP8", "exclude_modules": ["lm_head"]}
    }
    (folder / "hf_quant_config.json").write_text(json.dumps(said))
    with pytest.raises(CheckpointError, match=r"disagree about backbone\.layers\.1\.mixer\.fc1_latent_proj"):
        load(folder)


def test_hf_quant_config_alone_is_enough(tmp_path: Path) -> None:
    folder = small(tmp_path / "fp8")
    expected = load(folder).config.recipe
    config = json.loads((folder / "config.json").read_text())
    excluded = config.pop("quantization_config")["ignore"]
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match="describes a quantization"):
        load(folder)
    said = {"quant_algo": "FP8", "kv_cache_quant_algo": "FP8", "exclude_modules": excluded}
    (folder / "hf_quant_config.json").write_text(json.dumps({"quantization": said}))
    assert load(folder).config.recipe == expected


@pytest.mark.parametrize(
    ("said", "scheme"),
    [
        ({"quant_algo": "NVFP4"}, "NVFP4"),
        ({"quant_algo": "W4A16_AWQ"}, "W4A16_AWQ"),
        ({"quant_algo": "MXFP8"}, "MXFP8"),
        ({"quant_algo": "FP8_PB_WO"}, "FP8_PB_WO"),
        ({"quant_method": "gptq", "bits": 4}, "gptq"),
        ({"quant_method": "fp8", "weight_block_size": [128, 128]}, "block-scaled FP8"),
        ({"quant_algo": "MIXED_PRECISION", "quantized_layers": {"a": {"quant_algo": "NVFP4"}}}, "NVFP4"),
        ({"quant_algo": "FP8", "kv_cache_quant_algo": "NVFP4"}, "the KV cache is quantized as NVFP4"),
        ({"quant_algo": "FP8", "group_size": 16}, "group_size is not a known field"),
    ],
)
def test_other_schemes_are_refused_by_name(said: dict[str, Any], scheme: str) -> None:
    with pytest.raises(CheckpointError, match=scheme) as refused:
        parse_description(said, "config.json")
    assert "supported: FP8" in refused.value.hint


def test_a_marker_that_modelopt_left_behind_is_no_part_of_a_name() -> None:
    """As ModelOpt 0.47 with transformers 5.23 writes it; TensorRT-LLM met it too (its pull request 18607)."""
    mark = ".\0backbone.pt_name_sentinel"
    matches = pattern_matcher(
        [f"lm_head{mark}", f"backbone.layers.2{mark}*", f"backbone.layers.1.mixer.gate{mark}"]
    )
    for name, expected in {
        "lm_head": True,
        "backbone.layers.2.mixer.q_proj": True,
        "backbone.layers.21.mixer.q_proj": False,
        "backbone.layers.1.mixer.gate": True,
        "backbone.layers.1.mixer.experts": False,
    }.items():
        assert bool(matches(name)) is expected, name


def test_patterns_name_modules_and_what_is_below() -> None:
    matches = pattern_matcher(["lm_head", "model.layers.4.mixer", "*.q_proj"])
    for name, expected in {
        "lm_head": True,
        "backbone.layers.4.mixer.in_proj": True,
        "backbone.layers.41.mixer.in_proj": False,
        "backbone.layers.2.mixer.q_proj": True,
        "backbone.layers.2.mixer.k_proj": False,
    }.items():
        assert bool(matches(name)) is expected, name


def test_an_fp8_checkpoint_is_not_dequantized(tmp_path: Path) -> None:
    config = BuildConfig(
        checkpoint=small(tmp_path / "fp8"), output=tmp_path / "b", precision="bf16", runtime="onnx"
    )
    with pytest.raises(UsageError, match="the checkpoint is FP8: --precision bf16"):
        build.build(config)
    config = BuildConfig(
        checkpoint=tmp_path / "fp8", output=tmp_path / "b", exclude=("*.in_proj",), runtime="onnx"
    )
    with pytest.raises(UsageError, match="--exclude has no effect: the checkpoint is FP8 already"):
        build.build(config)


def test_check_knows_an_fp8_checkpoint(tmp_path: Path) -> None:
    found = check(read_headers(small(tmp_path / "fp8")))
    assert (found.is_buildable, found.precision) == (True, "fp8")
    assert "in_proj.weight" in found.dtypes["mamba"]["float8_e4m3fn"]
    assert "kv_cache" in found.dtypes["attention"]["float8_e4m3fn"]


def test_check_refuses_fp8_on_a_gpu_without_it(tmp_path: Path) -> None:
    headers = read_headers(small(tmp_path / "fp8"))
    with pytest.raises(UsageError, match="SM 86 has no FP8 tensor cores"):
        check(headers, runtime="tensorrt-rtx", sms=(86,))


def test_a_weight_is_widened_exactly() -> None:
    every = torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn)
    finite = every[~every.float().isnan()]
    assert len(finite) == 254
    assert bits(from_e4m3(finite)) == bits(finite.float())
