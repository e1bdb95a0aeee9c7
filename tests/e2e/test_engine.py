"""Engines of TensorRT-RTX, built from a checkpoint on a machine without a GPU, and what stops one from being built.

The plugin library has every kernel's name and none of their code, which TensorRT does not look at: one test, slow
the first time, links the real one.
"""

from __future__ import annotations

import importlib.util
import json
import re
from collections.abc import Callable
from pathlib import Path

import onnx
import pytest
from checkpoints import write_checkpoint
from host_library import library
from safetensors.torch import load_file

from nemotrt.exporter.config import BuildConfig
from nemotrt.exporter.engines.kernel_coverage import plugin_nodes
from nemotrt.exporter.engines.targets import Target
from nemotrt.exporter.errors import BundleError, CompileError
from nemotrt.exporter.pipelines import build
from nemotrt.exporter.runtime import manifest as manifests
from nemotrt.exporter.runtime.graph_file import OnnxGraph
from nemotrt.exporter.stages import compile as stage

pytestmark = [
    pytest.mark.tensorrt,
    pytest.mark.skipif(
        importlib.util.find_spec("tensorrt_rtx") is None,
        reason="TensorRT-RTX is not installed: pip install 'nemo-export[rtx]'",
    ),
]

KERNEL_SIZES = {"head_dim": 64, "mamba_head_dim": 64, "ssm_state_size": 128, "moe_intermediate_size": 32}
"""What the kernels take, unlike the sizes of most test checkpoints."""

RTX = "tensorrt-rtx"
TARGET = Target(RTX, (89,))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("engine")


@pytest.fixture(scope="module")
def checkpoint(folder: Path) -> Path:
    return write_checkpoint(folder / "checkpoint", **KERNEL_SIZES, mamba_num_heads=2, moe_latent_size=32)


@pytest.fixture(autouse=True)
def names_for_kernels(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(stage, "plugin_library", lambda config, sms, report: library())
    monkeypatch.setattr("nemotrt.exporter.engines.targets.check_can_link", lambda: None)
    kept = str(tmp_path / "cache")
    monkeypatch.setenv("NEMO_EXPORT_CACHE", kept)


def built(checkpoint: Path, output: Path, **options: object) -> tuple[manifests.Manifest, list[str]]:
    """The manifest of a bundle, and what the build said."""
    options = {
        "precision": "fp16",
        "max_tokens": 64,
        "max_sequences": 4,
        "max_context": 512,
        "validate": False,
    } | options
    build.build(BuildConfig(checkpoint, output, **options))  # type: ignore[arg-type]
    return manifests.read(output), (output / "logs/build.log").read_text().splitlines()


@pytest.fixture(scope="module")
def bundle(checkpoint: Path, folder: Path) -> Path:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(stage, "plugin_library", lambda config, sms, report: library())
        built(checkpoint, folder / "bundle", runtime=RTX, sms=(120, 89))
    return folder / "bundle"


def test_a_bundle_has_an_engine_its_library_and_its_log(bundle: Path) -> None:
    manifest = manifests.verify(bundle, deep=True)
    roles = {file.path: file.role for file in manifest.files}
    assert roles["engines/tensorrt-rtx.engine"] == "engine"
    assert roles["plugins/libnemo_plugins.so"] == "plugins"
    assert roles["logs/engine.log"] == "log"
    profile = manifest.profiles[1]
    assert (profile.runtime, profile.sms, profile.max_rows) == (RTX, (89, 120), 64)
    assert profile.runtime_version.startswith("1.")
    assert manifest.plugins[0].build == library().description["hash"]
    assert not any("partial" in str(path) for path in bundle.rglob("*"))


def test_every_op_is_a_plugin_layer_of_the_engine(bundle: Path) -> None:
    layers = (
        (bundle / "logs" / "engine.log").read_text().rpartition("Engine Layer Information")[2].splitlines()
    )
    engine = (bundle / "engines" / "tensorrt-rtx.engine").read_bytes()
    nodes = plugin_nodes(OnnxGraph.read(bundle / "model.onnx"))
    assert len(nodes) == 7
    for node in nodes:
        # In each of three profiles. One without state is called from inside a larger layer.
        assert engine.count(node.name.encode()) >= 3
        assert engine.count(node.spec.name.encode()) >= 3
        found = sum(line.startswith(f"Layer(PluginV3): {node.name}") for line in layers)
        assert found == (3 if node.spec.pools else 0)


@pytest.mark.parametrize("name", ["engines/tensorrt-rtx.engine", "plugins/libnemo_plugins.so"])
def test_a_changed_byte_is_found_before_anything_is_loaded(bundle: Path, name: str) -> None:
    path = bundle / name
    content = path.read_bytes()
    try:
        path.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
        with pytest.raises(BundleError, match=f"{name} was changed"):
            manifests.verify(bundle, deep=True)
    finally:
        path.write_bytes(content)


def test_bf16_builds_too(checkpoint: Path, tmp_path: Path) -> None:
    manifest, _ = built(checkpoint, tmp_path / "bundle", precision="bf16", runtime=RTX, sms=(80,))
    assert manifest.profiles[1].sms == (80,)


def test_a_few_layers_have_an_engine_under_their_own_names(checkpoint: Path, tmp_path: Path) -> None:
    manifest, _ = built(checkpoint, tmp_path / "bundle", runtime=RTX, sms=(89,), layers="2:5")
    assert manifest.model.chosen_layers == (2, 3, 4)
    names = [node.name for node in plugin_nodes(OnnxGraph.read(tmp_path / "bundle" / "model.onnx"))]
    assert names == ["layers.2.mixer.attention", "layers.4.mixer.conv", "layers.4.mixer.scan"]
    log = (tmp_path / "bundle" / "logs" / "engine.log").read_text()
    assert "Layer(PluginV3): layers.4.mixer.scan" in log


def test_a_model_that_no_kernel_serves_is_refused_by_name(tmp_path: Path) -> None:
    checkpoint = write_checkpoint(tmp_path / "checkpoint")
    with pytest.raises(
        CompileError, match=r"layers\.0\.mixer\.scan: .* the kernels require N to be one of .*, got 16"
    ) as caught:
        built(checkpoint, tmp_path / "bundle", runtime=RTX)
    assert "--runtime onnx" in caught.value.hint
    assert not list(tmp_path.glob("*bundle*"))


def test_auto_goes_on_without_an_engine_and_says_why(tmp_path: Path) -> None:
    checkpoint = write_checkpoint(tmp_path / "checkpoint")
    manifest, said = built(checkpoint, tmp_path / "bundle", runtime="auto")
    assert [profile.runtime for profile in manifest.profiles] == ["onnx"]
    assert manifest.plugins == ()
    (line,) = (line for line in said if "runtime: onnx (" in line)
    assert "no engine can be built: layers.0.mixer.scan: NemoSelectiveScan" in line


def edited(bundle: Path, folder: Path, edit: Callable[[onnx.ModelProto], None]) -> OnnxGraph:
    """The bundle's graph with a change, next to its weights."""
    model = onnx.load(str(bundle / "model.onnx"), load_external_data=False)
    edit(model)
    (folder / "model.onnx.data").hardlink_to(bundle / "model.onnx.data")
    (folder / "model.onnx").write_bytes(model.SerializeToString())
    return OnnxGraph.read(folder / "model.onnx")


def config(folder: Path) -> BuildConfig:
    return BuildConfig(folder, folder, precision="fp16", max_tokens=64, max_sequences=4, max_context=512)


def next_version(model: onnx.ModelProto) -> None:
    """Ops of a version that this package does not have."""
    for node in model.graph.node:
        for attribute in node.attribute:
            if node.op_type == "NemoCausalConv1d" and attribute.name == "plugin_version":
                attribute.s = b"2"


def test_ops_of_a_newer_version_are_named(bundle: Path, tmp_path: Path) -> None:
    graph = edited(bundle, tmp_path, next_version)
    with pytest.raises(
        CompileError, match=r"layers\.0\.mixer\.conv: NemoCausalConv1d is of op version 2, this"
    ):
        stage.prepare(config(tmp_path), TARGET, graph)


def test_an_op_that_tensorrt_inlines_is_a_failure(
    bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = OnnxGraph.read(bundle / "model.onnx")
    plugins, nodes = stage.prepare(config(tmp_path), TARGET, whole), plugin_nodes(whole)
    monkeypatch.setattr(stage, "plugin_nodes", lambda _: nodes)
    graph = edited(bundle, tmp_path, next_version)
    with pytest.raises(
        CompileError, match=r"2 of 7 nemo ops did not become plugin layers, the first layers\.0"
    ):
        stage.compile(config(tmp_path), TARGET, graph, plugins, tmp_path)
    assert not list((tmp_path / "engines").iterdir())


def test_a_graph_that_tensorrt_does_not_take_says_why_and_keeps_its_log(bundle: Path, tmp_path: Path) -> None:
    def unknown(model: onnx.ModelProto) -> None:
        next(node for node in model.graph.node if node.op_type == "Relu").op_type = "NonZero"

    plugins = stage.prepare(config(tmp_path), TARGET, OnnxGraph.read(bundle / "model.onnx"))
    graph = edited(bundle, tmp_path, unknown)
    with pytest.raises(CompileError, match="TensorRT does not take the graph: ") as caught:
        stage.compile(config(tmp_path), TARGET, graph, plugins, tmp_path)
    saved = Path(caught.value.hint.partition("TensorRT's messages are in ")[2])
    assert "NonZero" in saved.read_text()
    assert not list((tmp_path / "engines").iterdir())


def test_compiling_kernels_is_heard_of(bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def compiling(
        config: BuildConfig, sms: tuple[int, ...], report: Callable[[int, int, str], None]
    ) -> object:
        for done in range(1, 8):
            report(done, 7, "a kernel")
        return library()

    heard: list[int] = []
    monkeypatch.setattr(stage, "plugin_library", compiling)
    graph = OnnxGraph.read(bundle / "model.onnx")
    stage.prepare(config(tmp_path), TARGET, graph, advance=heard.append)
    assert len(heard) == 7
    assert sum(heard) == stage.KERNEL_STEPS
    assert max(heard) - min(heard) <= 1


def test_a_library_that_is_none_is_refused(bundle: Path, tmp_path: Path) -> None:
    graph = OnnxGraph.read(bundle / "model.onnx")
    stage.prepare(config(tmp_path), TARGET, graph)
    broken = tmp_path / "broken.so"
    broken.write_text("no library")

    class Broken:
        path = broken
        description = library().description

    with pytest.raises(CompileError, match="TensorRT does not load the plugin library"):
        stage.compile(config(tmp_path), TARGET, graph, Broken(), tmp_path)  # type: ignore[arg-type]


def test_a_full_disk_is_said_and_leaves_nothing(bundle: Path, tmp_path: Path) -> None:
    graph = OnnxGraph.read(bundle / "model.onnx")
    plugins = stage.prepare(config(tmp_path), TARGET, graph)
    (tmp_path / "engines").mkdir()
    (tmp_path / "engines" / "tensorrt-rtx.engine.partial").symlink_to("/dev/full")
    with pytest.raises(CompileError, match="the engine cannot be written: No space left on device"):
        stage.compile(config(tmp_path), TARGET, graph, plugins, tmp_path)
    assert not list((tmp_path / "engines").iterdir())


def test_the_version_is_asked_of_the_module_itself() -> None:
    import tensorrt_rtx

    assert stage.check_backend(TARGET) == tensorrt_rtx.__version__


@pytest.mark.slow
def test_the_real_library_serves_the_model(
    checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.undo()
    manifest, _ = built(checkpoint, tmp_path / "bundle", runtime=RTX, sms=(89,))
    assert manifest.profiles[1].sms == (89,)
    assert (
        json.loads((tmp_path / "bundle" / "manifest.json").read_text())["plugins"][0]["namespace"] == "nemo"
    )


def test_an_engine_is_built_from_files_that_are_linked(checkpoint: Path, tmp_path: Path) -> None:
    """TensorRT by itself takes no weights from a file with a second hard link."""
    manifest, _ = built(
        checkpoint, tmp_path / "out", runtime=RTX, sms=(89,), weights="link", precision="fp32"
    )
    assert (tmp_path / "out" / "model.safetensors").samefile(checkpoint / "model.safetensors")
    assert [profile.runtime for profile in manifest.profiles] == ["onnx", RTX]
    engine = (tmp_path / "out" / "engines" / "tensorrt-rtx.engine").read_bytes()
    for name, values in load_file(checkpoint / "model.safetensors").items():
        # Those of queries, keys and values become one matrix.
        if values.ndim == 2 and not re.search(r"\.[qkv]_proj\.", name):
            assert values.numpy().tobytes() in engine, name
