"""FP8 in engines of TensorRT-RTX, built on a machine without a GPU: what becomes of linears, experts and caches."""

from __future__ import annotations

import re
from pathlib import Path

import onnx
import pytest
import torch
from fp8_checkpoints import lowered, super_
from host_library import library
from onnx import TensorProto
from safetensors.torch import load_file, save_file

from nemotrt.exporter.config import BuildConfig
from nemotrt.exporter.engines.kernel_coverage import plugin_nodes
from nemotrt.exporter.pipelines import build
from nemotrt.exporter.runtime import manifest as manifests
from nemotrt.exporter.runtime.graph_file import OnnxGraph
from nemotrt.exporter.stages import compile as stage
from nemotrt.plugins.moe_dispatch import SPEC as MOE

trt = pytest.importorskip(
    "tensorrt_rtx", reason="TensorRT-RTX is not installed: pip install 'nemo-export[rtx]'"
)
pytestmark = pytest.mark.tensorrt

IN_PROJ = "backbone.layers.0.mixer.in_proj"
SIZES = {
    "head_dim": 64,
    "mamba_head_dim": 64,
    "mamba_num_heads": 2,
    "ssm_state_size": 128,
    "moe_intermediate_size": 32,
    "moe_latent_size": 32,
}
"""What the kernels take."""


def test_a_published_layout_is_built_for_both_generations_that_have_fp8(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(stage, "plugin_library", lambda config, sms, report: library())
    monkeypatch.setattr("nemotrt.exporter.engines.targets.check_can_link", lambda: None)
    monkeypatch.setenv("NEMO_EXPORT_CACHE", str(tmp_path / "cache"))
    checkpoint = super_(tmp_path / "fp8", hybrid_override_pattern="ME*E", **SIZES)
    config = BuildConfig(
        checkpoint,
        tmp_path / "bundle",
        runtime="tensorrt-rtx",
        sms=(89, 120),
        max_tokens=64,
        max_sequences=4,
        max_context=512,
        validate=False,
    )
    build.build(config)
    manifest = manifests.verify(tmp_path / "bundle", deep=True)
    assert manifest.model.precision == "fp8"
    assert manifest.profiles[1].sms == (89, 120)
    log = (tmp_path / "bundle" / "logs" / "engine.log").read_text()
    attention = next(line for line in log.splitlines() if "Layer(PluginV3): layers.2.mixer.attention" in line)
    assert "kv_cache.2 (FP8[" in attention
    nodes = {node.name: node for node in plugin_nodes(OnnxGraph.read(tmp_path / "bundle" / "model.onnx"))}
    inputs = dict(
        zip((spec.name for spec in MOE.inputs), nodes["layers.1.mixer.experts"].inputs, strict=True)
    )
    assert {name: dtype for name, (dtype, _) in inputs.items() if name.startswith(("up", "down"))} == {
        "up": "float8_e4m3fn",
        "down": "float8_e4m3fn",
        "up_scale": "float32",
        "down_scale": "float32",
    }


class Log(trt.ILogger):  # type: ignore[misc]
    """What TensorRT says, as lines."""

    def __init__(self) -> None:
        super().__init__()
        self.lines: list[str] = []

    def log(self, severity: object, line: str) -> None:
        """Keep a line."""
        self.lines.append(line)


def engine_layers(model: onnx.ModelProto, sm: str) -> dict[str, str]:
    """The layers of the engine that a graph of one input becomes: name → type, inputs and outputs."""
    log = Log()
    builder = trt.Builder(log)
    network, config = builder.create_network(), builder.create_builder_config()
    parser = trt.OnnxParser(network, log)
    assert parser.parse(model.SerializeToString()), parser.get_error(0).desc()
    config.num_compute_capabilities = 1
    config.set_compute_capability(getattr(trt.ComputeCapability, sm), 0)
    config.profiling_verbosity = trt.ProfilingVerbosity.DETAILED
    profile = builder.create_optimization_profile()
    width = network.get_input(0).shape[1]
    profile.set_shape(network.get_input(0).name, (1, width), (64, width), (256, width))
    config.add_optimization_profile(profile)
    assert builder.build_serialized_network(network, config)
    described = "\n".join(log.lines).rpartition("Engine Layer Information")[2]
    return dict(re.findall(r"Name: (\S+), (LayerType: (?:kgen|gemm).*)", described))


def linear_alone(graph: onnx.ModelProto, name: str) -> onnx.ModelProto:
    """A linear of a graph with what quantizes its input and holds its weight, and nothing else."""
    made_by = {output: node for node in graph.graph.node for output in node.output}
    gemm = next(node for node in graph.graph.node if node.name == name)
    x, weight = (made_by[value] for value in gemm.input[:2])
    rounded = made_by[x.input[0]]
    nodes = [rounded, x, weight, gemm]
    used = {value for node in nodes for value in node.input}
    dtype = TensorProto.BFLOAT16
    held = [tensor for tensor in graph.graph.initializer if tensor.name in used]
    outputs, inputs = next(tensor.dims for tensor in held if tensor.name.endswith(".weight"))
    made = onnx.helper.make_graph(
        nodes,
        name,
        [onnx.helper.make_tensor_value_info(rounded.input[0], dtype, ["T", inputs])],
        [onnx.helper.make_tensor_value_info(gemm.output[0], dtype, ["T", outputs])],
        held,
    )
    return onnx.helper.make_model(made, opset_imports=graph.opset_import, ir_version=graph.ir_version)


@pytest.mark.parametrize("sm", ["SM89", "SM120"])
@pytest.mark.parametrize("per_output", [False, True])
def test_a_linear_becomes_one_fp8_product(tmp_path: Path, sm: str, per_output: bool) -> None:
    checkpoint = super_(tmp_path / "fp8", hybrid_override_pattern="M", hidden_size=128, **SIZES)
    if per_output:
        tensors = load_file(checkpoint / "model.safetensors")
        rows = len(tensors[f"{IN_PROJ}.weight"])
        tensors[f"{IN_PROJ}.weight_scale"] = torch.linspace(1e-3, 1e-2, rows)
        save_file(tensors, checkpoint / "model.safetensors")
    graph, _ = lowered(checkpoint, tmp_path)
    layers = engine_layers(linear_alone(onnx.load(graph), "layers.0.mixer.in_proj"), sm)
    products = [what for what in layers.values() if "LayerType: gemm" in what]
    assert len(products) == 1
    inputs, _, outputs = products[0].partition("Outputs: ")
    assert inputs.count("Datatype: FP8") == 2
    # Before it the input is rounded. With one scale nothing is behind it: the product itself scales, and writes BF16.
    # A scale for each output is a second kernel's work, which is why none is made for a linear.
    assert len(layers) == 2 + per_output
    assert ("Datatype: Float," if per_output else "Datatype: BFloat16,") in outputs
