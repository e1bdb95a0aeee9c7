"""The lowered graph: a node an op, names that say where, FP32 islands, the checkpoint's bytes, the same twice."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest
import torch
from checkpoints import CONFIG, random_tensors, write_checkpoint
from torch import Tensor, nn
from torch.export import Dim

from nemotrt.exporter.checkpoint.loaded_model import LoadedModel
from nemotrt.exporter.config import BuildConfig
from nemotrt.exporter.errors import LowerError
from nemotrt.exporter.lowering.aten_to_onnx import Constants, Translator
from nemotrt.exporter.stages.load import load
from nemotrt.exporter.stages.lower import lower
from nemotrt.exporter.stages.trace import trace

FLOAT, HALF = ir.DataType.FLOAT, ir.DataType.FLOAT16


@pytest.fixture(scope="module")
def loaded(checkpoint: Path) -> LoadedModel:
    return load(checkpoint)


def build(model: LoadedModel, folder: Path, precision: str) -> ir.Model:
    folder.mkdir()
    config = BuildConfig(checkpoint=model.folder, output=folder, precision=precision)
    lower(model, trace(model, config), folder / "model.onnx")
    return ir.load(folder / "model.onnx")


@pytest.fixture(scope="module")
def graphs(loaded: LoadedModel, tmp_path_factory: pytest.TempPathFactory) -> dict[str, ir.Model]:
    root = tmp_path_factory.mktemp("graphs")
    return {precision: build(loaded, root / precision, precision) for precision in ("fp32", "fp16")}


def test_one_node_an_op_named_for_its_place(graphs: dict[str, ir.Model]) -> None:
    ops = {node.name: node.op_type for node in graphs["fp32"].graph if node.domain == "nemo"}
    assert ops == {
        "layers.0.mixer.conv": "NemoCausalConv1d",
        "layers.0.mixer.scan": "NemoSelectiveScan",
        "layers.1.mixer.experts": "NemoMoeDispatch",
        "layers.2.mixer.attention": "NemoPagedAttention",
        "layers.4.mixer.conv": "NemoCausalConv1d",
        "layers.4.mixer.scan": "NemoSelectiveScan",
        "layers.5.mixer.experts": "NemoMoeDispatch",
    }


def test_every_op_names_its_plugin_and_has_a_body(graphs: dict[str, ir.Model]) -> None:
    model = graphs["fp32"]
    for node in model.graph:
        if node.domain == "nemo":
            assert node.attributes["plugin_namespace"].as_string() == "nemo"
            assert node.attributes["plugin_version"].as_string() == "1"
            assert (node.domain, node.op_type, "") in model.functions


def test_names_are_unique_and_say_where(graphs: dict[str, ir.Model]) -> None:
    nodes = list(graphs["fp16"].graph)
    assert max(Counter(node.name for node in nodes).values()) == 1
    assert all(node.name.startswith(("embeddings.", "layers.", "head.")) for node in nodes if node.name)
    assert "layers.0.mixer.in_proj" in {node.name for node in nodes}


def test_every_value_has_a_shape_in_the_contract_s_axes(graphs: dict[str, ir.Model]) -> None:
    axes = {"T", "B", "B+1", "S", "K", "M", "R"}
    for node in graphs["fp16"].graph:
        for output in node.outputs:
            if output.shape is not None:
                names = {str(size.value) for size in output.shape if isinstance(size, ir.SymbolicDim)}
                assert names <= axes, f"{output.name} has {names - axes}"


def test_pools_are_paired(graphs: dict[str, ir.Model]) -> None:
    graph = graphs["fp16"].graph
    pools = {value.name: value for value in graph.inputs if "." in (value.name or "")}
    outputs = {value.name: value for value in graph.outputs}
    assert [*outputs] == ["logits", *(f"next.{name}" for name in pools)]
    for name, pool in pools.items():
        assert (outputs[f"next.{name}"].shape, outputs[f"next.{name}"].dtype) == (pool.shape, pool.dtype)
    assert pools["ssm_state.0"].dtype == FLOAT
    assert pools["conv_state.0"].dtype == pools["kv_cache.2"].dtype == HALF
    assert outputs["logits"].dtype == FLOAT


def test_fp32_islands_of_an_fp16_graph(graphs: dict[str, ir.Model]) -> None:
    weights = graphs["fp16"].graph.initializers
    for name, dtype in {
        "backbone.layers.0.mixer.A": FLOAT,
        "backbone.layers.0.mixer.D": FLOAT,
        "backbone.layers.0.mixer.dt_bias": FLOAT,
        "backbone.layers.0.norm.weight": FLOAT,
        "backbone.layers.0.mixer.norm.weight": FLOAT,
        "backbone.layers.1.mixer.gate.weight": FLOAT,
        "backbone.layers.0.mixer.in_proj.weight": HALF,
        "backbone.layers.1.mixer.experts.up": HALF,
    }.items():
        assert weights[name].dtype == dtype, name
    for node in graphs["fp16"].graph:
        if node.op_type == "RMSNormalization" or node.name.endswith("mixer.gate"):
            assert node.outputs[0].dtype == FLOAT


def test_weights_are_the_checkpoint_s(graphs: dict[str, ir.Model]) -> None:
    stored = random_tensors(CONFIG)
    weights = {name: value.const_value.numpy() for name, value in graphs["fp32"].graph.initializers.items()}
    layer = "backbone.layers.0.mixer"
    assert np.array_equal(weights[f"{layer}.in_proj.weight"], stored[f"{layer}.in_proj.weight"].numpy())
    assert np.array_equal(
        weights[f"{layer}.conv1d.weight"], stored[f"{layer}.conv1d.weight"].squeeze(1).numpy()
    )
    assert np.allclose(weights[f"{layer}.A"], -np.exp(stored[f"{layer}.A_log"].numpy()), rtol=1e-6)
    up = weights["backbone.layers.1.mixer.experts.up"]
    for e in range(4):
        expected = stored[f"backbone.layers.1.mixer.experts.{e}.up_proj.weight"].numpy()
        assert np.array_equal(up[e], expected)


def test_same_input_same_bytes(loaded: LoadedModel, tmp_path: Path) -> None:
    for name in ("a", "b"):
        build(loaded, tmp_path / name, "fp16")
    for file in ("model.onnx", "model.onnx.data"):
        assert (tmp_path / "a" / file).read_bytes() == (tmp_path / "b" / file).read_bytes()


def test_tied_embeddings_are_one_weight(tmp_path: Path) -> None:
    model = load(write_checkpoint(tmp_path / "tied", tie_word_embeddings=True))
    graph = build(model, tmp_path / "graph", "fp32").graph
    readers = [
        node.op_type
        for node in graph
        if any(value is not None and value.name == "backbone.embeddings.weight" for value in node.inputs)
    ]
    assert readers == ["Gather", "Gemm"]
    assert "lm_head.weight" not in graph.initializers


class Scaled(nn.Module):
    def forward(self, x_TD: Tensor) -> Tensor:
        return torch.add(x_TD, x_TD, alpha=2)


class Joined(nn.Module):
    def forward(self, x_TD: Tensor) -> Tensor:
        return x_TD.reshape(-1, 2)


@pytest.mark.parametrize(("module", "message"), [(Scaled(), "alpha"), (Joined(), "reshapes")])
def test_what_a_node_would_lose_is_refused(module: nn.Module, message: str) -> None:
    program = torch.export.export(module, (torch.zeros(5, 4),), dynamic_shapes=({0: Dim.DYNAMIC},))
    x_TD = ir.val("x", FLOAT, ["T", 4])
    with pytest.raises(LowerError, match=message):
        Translator("", {}, Constants()).translate(program.graph, {"x_td": x_TD, "x_TD": x_TD})


def test_an_op_too_few_is_refused(loaded: LoadedModel, tmp_path: Path) -> None:
    config = BuildConfig(checkpoint=loaded.folder, output=tmp_path, precision="fp32")
    traced = trace(loaded, config)
    layers = ("mamba", *loaded.config.layers[1:-1], "mlp")
    other = replace(loaded, config=replace(loaded.config, layers=layers))
    with pytest.raises(LowerError, match="the configuration needs"):
        lower(other, traced, tmp_path / "model.onnx")
