"""The estimates of `check` against a real build, for everything that does not depend on the machine's speed."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import fp8_checkpoints
import pytest
from checkpoints import CONFIG, random_tensors, write_checkpoint

from nemotrt.exporter.checkpoint.safetensors_reader import SINGLE
from nemotrt.exporter.config import BuildConfig
from nemotrt.exporter.engines import plugin_library
from nemotrt.exporter.engines.targets import Target
from nemotrt.exporter.errors import CheckpointError
from nemotrt.exporter.lowering.data_layout import data_path
from nemotrt.exporter.pipelines import build, check, estimates
from nemotrt.exporter.pipelines.estimates import StageEstimate
from nemotrt.exporter.pipelines.quantize import quantize_checkpoint

ROOT = Path(__file__).parents[2]
SCRIPT = ROOT / "scripts" / "estimates.py"
EXAMPLE = ROOT / "examples" / "tiny"
WIDER = {"hidden_size": 256, "vocab_size": 2048}
"""Large enough that weights take more space than the graph's nodes."""


def estimated(checkpoint: Path, precision: str = "", **options: Any) -> dict[str, StageEstimate]:
    headers = check.read_headers(checkpoint)
    result = check.check(headers, precision, **{"runtime": "onnx", **options})
    return {stage.stage: stage for stage in result.estimates}


@pytest.mark.parametrize("precision", ["fp32", "fp16"])
@pytest.mark.parametrize("how", ["copy", "link"])
def test_bytes_written_are_exact_except_for_the_nodes(tmp_path: Path, precision: str, how: str) -> None:
    checkpoint = write_checkpoint(tmp_path / "checkpoint", **WIDER)
    config = BuildConfig(
        checkpoint, tmp_path / "out", precision=precision, runtime="onnx", weights=how, validate=False
    )
    build.build(config)
    graph = tmp_path / "out" / "model.onnx"
    written = graph.stat().st_size + data_path(graph).stat().st_size
    stage = estimated(checkpoint, precision, weights=how)["lower"]
    assert stage.disk_bytes == pytest.approx(written, rel=0.1)
    layers = len(CONFIG["hybrid_override_pattern"])
    nodes = estimates.GRAPH_FILE + layers * estimates.GRAPH_LAYER
    assert stage.disk_bytes - nodes == data_path(graph).stat().st_size


def test_a_table_gives_the_estimates_of_its_checkpoint(checkpoint: Path, tmp_path: Path) -> None:
    headers = check.read_headers(checkpoint)
    names = {"float32": "F32", "bfloat16": "BF16", "float16": "F16"}
    table = {name: [names[tensor.dtype], tensor.shape] for name, tensor in headers.stored.items()}
    (tmp_path / "table.json").write_text(json.dumps(table))
    from_table = check.read_config(checkpoint / "config.json", tmp_path / "table.json")
    assert check.check(from_table).estimates == check.check(headers).estimates


@pytest.mark.parametrize("kind", ["plain", "fp8", "tied"])
def test_a_configuration_alone_gives_the_estimates_of_its_checkpoint(tmp_path: Path, kind: str) -> None:
    folder = tmp_path / "checkpoint"
    if kind == "fp8":
        fp8_checkpoints.nano(folder)
    else:
        write_checkpoint(folder, tie_word_embeddings=kind == "tied")
    whole = check.check(check.read_headers(folder))
    alone = check.check(check.read_config(folder / "config.json"))
    assert not alone.problems
    for name in ("precision", "dtypes", "num_parameters", "num_active_parameters", "num_tensors", "layers"):
        assert getattr(alone, name) == getattr(whole, name), name
    assert [stage.disk_bytes for stage in alone.estimates] == [stage.disk_bytes for stage in whole.estimates]


@pytest.mark.parametrize("table", [None, {}])
def test_a_quantization_is_read_from_a_configuration_without_weights(
    tmp_path: Path, table: dict[str, Any] | None
) -> None:
    quantization = {"quant_method": "modelopt", "quant_algo": "NVFP4"}
    (tmp_path / "config.json").write_text(json.dumps(CONFIG | {"quantization_config": quantization}))
    (tmp_path / "table.json").write_text(json.dumps(table))
    with pytest.raises(CheckpointError, match="quantized as NVFP4"):
        check.read_config(tmp_path / "config.json", None if table is None else tmp_path / "table.json")


@pytest.mark.parametrize(
    "table", [{}, {"backbone.layers.1.mixer.experts.0.up_proj.weight_scale_2": ["F32", []]}]
)
def test_counts_are_of_the_model_whatever_the_tensors_are(tmp_path: Path, table: dict[str, Any]) -> None:
    (tmp_path / "config.json").write_text(json.dumps(CONFIG))
    (tmp_path / "table.json").write_text(json.dumps(table))
    result = check.check(check.read_config(tmp_path / "config.json", tmp_path / "table.json"))
    assert result.problems
    assert result.num_parameters == sum(tensor.numel() for tensor in random_tensors(CONFIG).values())
    # Of four experts a token uses two; each has an up and a down projection between 16 and 24 values.
    assert result.num_parameters - result.num_active_parameters == 2 * 2 * 2 * 16 * 24
    assert all(
        min(stage.memory_bytes, stage.disk_bytes, stage.cpu_seconds) >= 0 for stage in result.estimates
    )


def test_runtimes_that_build_here_have_their_own_stages(
    checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    targets = {"tensorrt-rtx": Target("tensorrt-rtx", (89, 120))}
    monkeypatch.setattr(check, "_engine_targets", lambda *_: (targets, {}))
    stages = check.check(check.read_headers(checkpoint)).estimates
    engines = [(stage.stage, stage.runtime) for stage in stages if stage.runtime]
    assert engines == [(name, "tensorrt-rtx") for name in ("kernels", "compile", "bundle")]
    memory = {stage.stage: stage.memory_bytes for stage in stages}
    assert memory["compile"] > memory["lower"] + estimates.ENGINE_MEMORY


@pytest.mark.slow
def test_memory_of_a_build() -> None:
    """In a process of its own, which has loaded nothing else. PyTorch's CPU build takes less than the CUDA build."""
    command = [sys.executable, SCRIPT, EXAMPLE, "--json"]
    measured = json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE).stdout)
    stages = estimated(EXAMPLE)
    assert list(stages) == list(measured)
    for name, stage in stages.items():
        assert 0.5 < measured[name]["memory_bytes"] / stage.memory_bytes < 1.25, name


def test_quantization_is_a_stage(tmp_path: Path) -> None:
    stages = estimated(EXAMPLE, "fp8")
    assert list(stages) == ["load", "zeros", "quantize", "trace", "lower", "validate", "weights", "bundle"]
    assert "quantize" not in estimated(EXAMPLE, "fp16")
    quantize_checkpoint(EXAMPLE, tmp_path / "fp8")
    written = (tmp_path / "fp8" / SINGLE).stat().st_size
    assert stages["quantize"].disk_bytes == pytest.approx(written, rel=0.05)
    assert "quantize" not in estimated(tmp_path / "fp8", "fp8")


def test_linked_kernels_take_no_time(
    checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = BuildConfig(Path(), Path(), precision="fp16")
    monkeypatch.setenv("NEMO_EXPORT_CACHE", str(tmp_path))
    monkeypatch.setattr(plugin_library, "is_shipped", lambda: False)
    assert not plugin_library.is_at_hand(config, (89, 120))
    plugin_library._place(config, (89, 120)).mkdir(parents=True)
    assert plugin_library.is_at_hand(config, (120, 89))
    assert not plugin_library.is_at_hand(config, (89,))
    targets = {"tensorrt-rtx": Target("tensorrt-rtx", (89, 120))}
    monkeypatch.setattr(check, "_engine_targets", lambda *_: (targets, {}))
    for precision, is_linked in (("bf16", False), ("fp16", True)):
        kernels = estimated(checkpoint, precision, runtime="auto")["kernels"]
        assert (kernels.cpu_seconds == 0) == is_linked


def test_time_is_an_order_of_magnitude() -> None:
    """No estimate has more than one significant digit."""
    stages = estimated(EXAMPLE, "bf16").values()
    assert len(stages) > 4
    assert all(stage.cpu_seconds == float(f"{stage.cpu_seconds:.0e}") for stage in stages)
