"""Every byte of a graph's weights is compared with the checkpoint; one that differs is found, and named."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import fp8_checkpoints
import numpy as np
import onnx
import pytest
from checkpoints import write_checkpoint
from faults import Graph, broken
from faults.experts import last_expert_twice

from nemotrt.exporter.checkpoint.loaded_model import LoadedModel
from nemotrt.exporter.config import BuildConfig
from nemotrt.exporter.errors import ValidationError
from nemotrt.exporter.lowering import external_data
from nemotrt.exporter.pipelines import build as builds
from nemotrt.exporter.pipelines.opened_bundle import OWN_WEIGHTS, OpenedBundle, open_bundle
from nemotrt.exporter.pipelines.validate import revalidate
from nemotrt.exporter.progress import SILENT
from nemotrt.exporter.report import json_file
from nemotrt.exporter.report.model import Metric, Omitted, ValidationReport
from nemotrt.exporter.runtime import strict_json
from nemotrt.exporter.runtime.graph_file import OnnxGraph
from nemotrt.exporter.stages.load import load
from nemotrt.exporter.stages.lower import lower
from nemotrt.exporter.stages.trace import trace
from nemotrt.exporter.validation import plan as plans
from nemotrt.exporter.validation.request import ValidationRequest
from nemotrt.exporter.validation.stored_weights import (
    WEIGHTS,
    compare_weights,
    expected_weights,
    with_weights,
)
from nemotrt.plugins import onnx_op
from nemotrt.plugins.selective_scan import SPEC as SCAN

EMBEDDINGS, HEAD = "backbone.embeddings.weight", "lm_head.weight"
UP, DOWN = (f"backbone.layers.1.mixer.experts.{name}" for name in ("up", "down"))


class Right(NamedTuple):
    model: LoadedModel
    config: BuildConfig
    graph: Path


@pytest.fixture(scope="module", params=["fp32", "fp16", "bf16", "fp8"])
def right(
    request: pytest.FixtureRequest, checkpoint: Path, tmp_path_factory: pytest.TempPathFactory
) -> Right:
    folder = tmp_path_factory.mktemp(request.param)
    if request.param == "fp8":
        checkpoint = fp8_checkpoints.small(folder / "checkpoint")
    model = load(checkpoint)
    config = BuildConfig(model.folder, folder, precision=request.param)
    lower(model, trace(model, config), folder / "model.onnx")
    return Right(model, config, folder / "model.onnx")


Failed = dict[Metric, tuple[float, str]]


def failed(model: LoadedModel, config: BuildConfig, graph: Path, base: LoadedModel | None = None) -> Failed:
    """The gates that failed: how many weights, and the first of them."""
    gates = compare_weights(OnnxGraph.read(graph), expected_weights(model, config, base))
    assert [gate.metric for gate in gates] == [Metric.WEIGHT, Metric.NOT_STORED]
    return {gate.metric: (gate.value, gate.output) for gate in gates if not gate.passed}


def copied(right: Right, folder: Path) -> Path:
    for file in right.graph.parent.glob("model.onnx*"):
        shutil.copy(file, folder)
    return folder / right.graph.name


def test_a_right_graph_has_the_checkpoint_s_bytes(right: Right) -> None:
    lengths: list[int] = []
    expected = expected_weights(right.model, right.config)
    gates = compare_weights(OnnxGraph.read(right.graph), expected, advance=lengths.append)
    assert [(gate.value, gate.output) for gate in gates] == [(0, "all"), (0, "all")]
    assert sum(lengths) == sum(weight.length for weight in expected.values())
    initializers = onnx.load(right.graph, load_external_data=False).graph.initializer
    assert {tensor.name for tensor in initializers if tensor.external_data} == set(expected)


def negated_expert(graph: Graph) -> None:
    graph.weights[UP][1] *= -1


def zero_row(graph: Graph) -> None:
    graph.weights[EMBEDDINGS][-1] = 0


def last_bit(graph: Graph) -> None:
    """The least significant bit of the last value: too little for any comparison of outputs."""
    values = graph.weights[HEAD].reshape(-1)
    values.view(np.uint8)[-values.itemsize] ^= 1


def first_bit(graph: Graph) -> None:
    graph.weights["backbone.layers.0.mixer.A"].view(np.uint8)[0] ^= 1


def other_scale(graph: Graph) -> None:
    graph.weights["backbone.layers.1.mixer.experts.down_scale"][2, 3] *= 1.001


def other_input_scale(graph: Graph) -> None:
    graph.weights["backbone.layers.1.mixer.experts.hidden_scale"][0] *= 1.001


FAULTS = {
    negated_expert: UP,
    zero_row: EMBEDDINGS,
    last_bit: HEAD,
    first_bit: "backbone.layers.0.mixer.A",
    other_scale: "backbone.layers.1.mixer.experts.down_scale",
    other_input_scale: "backbone.layers.1.mixer.experts.hidden_scale",
}


@pytest.mark.parametrize("inject", FAULTS, ids=lambda inject: inject.__name__)
def test_a_weight_that_was_changed_is_named(
    right: Right, tmp_path: Path, inject: Callable[[Graph], None]
) -> None:
    graph = copied(right, tmp_path)
    broken(graph, inject)
    assert graph.read_bytes() == right.graph.read_bytes()
    assert failed(right.model, right.config, graph) == {Metric.WEIGHT: (1, FAULTS[inject])}


def edit(path: Path, change: Callable[[dict[str, onnx.TensorProto], onnx.GraphProto], None]) -> None:
    """Change the initializers of the graph's file."""
    model = onnx.load(path, load_external_data=False)
    change({tensor.name: tensor for tensor in model.graph.initializer}, model.graph)
    path.write_bytes(model.SerializeToString())


def swapped(tensors: dict[str, onnx.TensorProto], _: onnx.GraphProto) -> None:
    tensors[EMBEDDINGS].name, tensors[HEAD].name = HEAD, EMBEDDINGS


def longer(tensors: dict[str, onnx.TensorProto], _: onnx.GraphProto) -> None:
    entry = next(entry for entry in tensors[HEAD].external_data if entry.key == "length")
    entry.value = str(int(entry.value) + 1)


def reshaped(tensors: dict[str, onnx.TensorProto], _: onnx.GraphProto) -> None:
    tensors[HEAD].dims[:] = reversed(tensors[HEAD].dims)


def missing(tensors: dict[str, onnx.TensorProto], graph: onnx.GraphProto) -> None:
    graph.initializer.remove(tensors[HEAD])


def inside(tensors: dict[str, onnx.TensorProto], _: onnx.GraphProto) -> None:
    """Values in the graph's own file, where no weight belongs."""
    values = np.zeros(tuple(tensors[HEAD].dims), dtype=np.float32)
    tensors[HEAD].CopyFrom(onnx.numpy_helper.from_array(values, HEAD))


def elsewhere(tensors: dict[str, onnx.TensorProto], _: onnx.GraphProto) -> None:
    entry = next(entry for entry in tensors[HEAD].external_data if entry.key == "location")
    entry.value = "missing.data"


EDITS = {
    elsewhere: (1, HEAD),
    swapped: (2, EMBEDDINGS),
    longer: (1, HEAD),
    reshaped: (1, HEAD),
    missing: (1, HEAD),
    inside: (1, HEAD),
}


@pytest.mark.parametrize("change", EDITS, ids=lambda change: change.__name__)
def test_a_weight_in_another_place_is_named(
    right: Right,
    tmp_path: Path,
    change: Callable[[dict[str, onnx.TensorProto], onnx.GraphProto], None],
) -> None:
    graph = copied(right, tmp_path)
    edit(graph, change)
    assert failed(right.model, right.config, graph) == {Metric.WEIGHT: EDITS[change]}


def test_a_file_that_is_too_short_is_a_difference(right: Right, tmp_path: Path) -> None:
    graph = copied(right, tmp_path)
    with graph.with_name("model.onnx.data").open("r+b") as file:
        file.truncate(file.seek(0, 2) - 1)
    assert failed(right.model, right.config, graph) == {Metric.WEIGHT: (1, HEAD)}


@pytest.mark.parametrize("dtype", [np.float32, np.float16])
def test_a_value_that_no_tensor_accounts_for_is_named(right: Right, tmp_path: Path, dtype: type) -> None:
    def add(_: dict[str, onnx.TensorProto], graph: onnx.GraphProto) -> None:
        graph.initializer.append(onnx.numpy_helper.from_array(np.array([1, 1.5], dtype), "constant.99"))

    graph = copied(right, tmp_path)
    edit(graph, add)
    assert failed(right.model, right.config, graph) == {Metric.NOT_STORED: (1, "constant.99")}


def scaled_decay(graph: Graph) -> None:
    """By so little that numbers of BF16 do not show it."""
    scan = graph.op(SCAN.name)
    decay = onnx_op.operand(SCAN, scan, "A")
    graph.feed(scan, decay.name, graph.before(scan, "Mul", decay, np.float32(1.001)))


def copied_embeddings(graph: Graph) -> None:
    """A copy in the graph, in which the row of one token is zero."""
    weight = graph.nodes.initializers[EMBEDDINGS]
    (use,) = weight.uses()
    copy = graph.weights[EMBEDDINGS].copy()
    copy[-1] = 0
    use.node.replace_input_with(use.idx, graph.constant(use.node, copy))


def test_a_weight_that_the_graph_changes_is_named(right: Right, tmp_path: Path) -> None:
    graph = copied(right, tmp_path)
    broken(graph, scaled_decay)
    failures = failed(right.model, right.config, graph)
    assert failures[Metric.WEIGHT] == (1, "backbone.layers.0.mixer.A")
    assert failures[Metric.NOT_STORED][0] == 1


def test_a_copy_that_is_read_in_place_of_a_weight_is_named(right: Right, tmp_path: Path) -> None:
    graph = copied(right, tmp_path)
    broken(graph, copied_embeddings)
    failures = failed(right.model, right.config, graph)
    assert failures[Metric.WEIGHT] == (1, EMBEDDINGS)
    assert failures[Metric.NOT_STORED][0] == 1


def test_experts_that_are_gathered_are_named(right: Right, tmp_path: Path) -> None:
    graph = copied(right, tmp_path)
    broken(graph, last_expert_twice)
    ((metric, (_, name)),) = failed(right.model, right.config, graph).items()
    assert (metric, name) == (Metric.WEIGHT, UP)


def test_a_renamed_weight_fails_both_gates(right: Right, tmp_path: Path) -> None:
    graph = copied(right, tmp_path)
    edit(graph, lambda tensors, _: setattr(tensors[HEAD], "name", "head"))
    assert failed(right.model, right.config, graph) == {
        Metric.WEIGHT: (1, HEAD),
        Metric.NOT_STORED: (1, "head"),
    }


@pytest.mark.parametrize("link", [False, True])
def test_tied_and_linked_weights_are_compared(tmp_path: Path, link: bool) -> None:
    model = load(write_checkpoint(tmp_path / "checkpoint", tie_word_embeddings=True))
    folder = tmp_path / "graph"
    folder.mkdir()
    config = BuildConfig(model.folder, folder, precision="fp32")
    lower(model, trace(model, config), folder / "model.onnx", link=link)
    assert failed(model, config, folder / "model.onnx") == {}
    broken(folder / "model.onnx", lambda graph: graph.weights[DOWN].__imul__(-1))
    assert failed(model, config, folder / "model.onnx") == {Metric.WEIGHT: (1, DOWN)}


EXAMPLE = Path(__file__).resolve().parents[2] / "examples" / "tiny"


@pytest.fixture(scope="module")
def quantized(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A bundle of the example that its build has quantized, Mamba layers too."""
    bundle = tmp_path_factory.mktemp("quantized") / "bundle"
    options = {"precision": "fp8", "preset": "published", "runtime": "onnx", "validate": False}
    builds.build(BuildConfig(EXAMPLE, bundle, **options))
    return bundle


def failed_after(quantized: Path, tmp_path: Path, weight: str) -> tuple[Failed, OpenedBundle]:
    """The gates that fail after one bit of this weight was changed, against the unquantized checkpoint."""
    shutil.copytree(quantized, tmp_path / "bundle")

    def change(graph: Graph) -> None:
        if weight:
            graph.weights[weight].reshape(-1).view(np.uint8)[-1] ^= 1

    broken(tmp_path / "bundle" / "model.onnx", change)
    opened = open_bundle(tmp_path / "bundle", EXAMPLE)
    return failed(opened.model, opened.config, opened.graph.path, opened.base), opened


@pytest.mark.parametrize(
    "weight", [UP, f"{UP}_scale", "3.mixer.up_proj.weight", "3.mixer.up_proj.weight_scale", HEAD, "6.mixer.A"]
)
def test_what_a_build_quantized_is_quantized_again(quantized: Path, tmp_path: Path, weight: str) -> None:
    name = f"backbone.layers.{weight}" if weight[0].isdigit() else weight
    result, opened = failed_after(quantized, tmp_path, name)
    assert opened.has_own_weights
    assert result == {Metric.WEIGHT: (1, name)}


def test_what_calibration_determined_is_not_compared_and_the_report_says_so(
    quantized: Path, tmp_path: Path
) -> None:
    result, opened = failed_after(quantized, tmp_path, "backbone.layers.1.mixer.experts.input_scale")
    assert result == {}
    expected = expected_weights(opened.model, opened.config, opened.base)
    kept = {name for name, weight in expected.items() if weight.pieces is None}
    assert {name.rpartition(".")[2] for name in kept} == {"input_scale", "hidden_scale", "k_scale", "v_scale"}
    empty = ValidationReport("a", "b", "", {}, (), {}, ())
    (entry,) = with_weights(empty, opened.graph, expected, SILENT).not_compared
    assert entry.what is Omitted.CHECKPOINT
    assert entry.detail.startswith(f"{len(kept)} scales that the build's calibration determined")


@pytest.fixture(scope="module")
def built(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    bundle = tmp_path_factory.mktemp("built") / "bundle"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(plans, "NUM_DECODE", 4)
        builds.build(BuildConfig(checkpoint, bundle, precision="fp32", runtime="onnx"))
    return bundle


def test_a_build_and_a_later_validation_compare_the_weights(
    built: Path, checkpoint: Path, tmp_path: Path
) -> None:
    report = json_file.parse(strict_json.read_object(built / json_file.NAME), json_file.NAME)
    in_build = [gate for gate in report.gates if gate.scenario == WEIGHTS]
    assert [gate.value for gate in in_build] == [0, 0]
    bundle = shutil.copytree(built, tmp_path / "bundle")
    broken(bundle / "model.onnx", last_bit)
    later = revalidate(ValidationRequest(bundle, checkpoint, layers_alone=True))
    assert [(gate.scenario, gate.output) for gate in later.failed] == [(WEIGHTS, HEAD)]
    own = revalidate(ValidationRequest(bundle, layers_alone=True))
    assert own.passed
    assert OWN_WEIGHTS in own.not_compared
    assert WEIGHTS not in {gate.scenario for gate in own.gates}


def test_a_build_finds_what_was_not_written_as_it_was_computed(
    checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write = external_data.write

    def write_wrongly(path: Path, *arguments: Any, **options: Any) -> int:
        count = write(path, *arguments, **options)
        data = np.memmap(path, np.uint8, "r+")
        data[-2] ^= 1
        data.flush()
        return count

    monkeypatch.setattr(external_data, "write", write_wrongly)
    monkeypatch.setattr(plans, "NUM_DECODE", 4)
    with pytest.raises(ValidationError, match=r"1 of .*: weights, lm_head.weight: differs from checkpoint 1"):
        builds.build(BuildConfig(checkpoint, tmp_path / "bundle", precision="bf16", runtime="onnx"))
