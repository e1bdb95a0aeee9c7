"""A few layers of a checkpoint: which ones a choice means, and that each keeps its index everywhere."""

from __future__ import annotations

from pathlib import Path

import pytest
from checkpoints import CONFIG, random_tensors, write_checkpoint
from safetensors.torch import save_file

from nemotrt.exporter.checkpoint.layer_selection import chosen_layers
from nemotrt.exporter.checkpoint.safetensors_reader import SINGLE
from nemotrt.exporter.errors import CheckpointError, UsageError
from nemotrt.exporter.pipelines.check import check, read_headers
from nemotrt.exporter.stages.load import load
from nemotrt.model.config import ModelConfig

LAYERS = ModelConfig.from_dict(CONFIG).layers  # ME*-ME


@pytest.mark.parametrize(
    ("choice", "indices"),
    [
        ("0:4", (0, 1, 2, 3)),
        ("4:", (4, 5)),
        (":2", (0, 1)),
        (":", (0, 1, 2, 3, 4, 5)),
        ("5", (5,)),
        ("0,2,5", (0, 2, 5)),
        ("0:2, 4", (0, 1, 4)),
        ("first-of-each", (0, 1, 2, 3)),
    ],
)
def test_a_choice_means_layers(choice: str, indices: tuple[int, ...]) -> None:
    assert chosen_layers(LAYERS, choice) == indices


def test_the_first_of_each_kind_is_in_the_order_of_the_model() -> None:
    assert chosen_layers(("moe", "mamba", "moe", "attention", "mamba"), "first-of-each") == (0, 1, 3)


@pytest.mark.parametrize(
    ("choice", "message"),
    [
        ("", "does not select layers"),
        ("kinds", "does not select layers"),
        ("-1", "does not select layers"),
        ("1:2:3", "does not select layers"),
        ("0,,1", "does not select layers"),
        ("2:2", "2:2 is an empty range"),
        ("3:1", "3:1 is an empty range"),
        ("6", "the model has 6 layers"),
        ("0:7", "the model has 6 layers"),
        ("2,0", "must list each layer once"),
        ("1,1", "must list each layer once"),
        ("0:3,2", "must list each layer once"),
    ],
)
def test_a_choice_that_means_none_is_refused(choice: str, message: str) -> None:
    with pytest.raises(UsageError, match=message) as caught:
        chosen_layers(LAYERS, choice)
    assert caught.value.hint


def test_a_layer_keeps_its_index_and_its_tensors(checkpoint: Path) -> None:
    whole, partial = load(checkpoint), load(checkpoint, "1,4")
    assert partial.config.layers == ("moe", "mamba")
    assert partial.config.numbered_layers == {1: "moe", 4: "mamba"}
    beside = {name for name in whole.weights if ".layers." not in name}
    of_layers = {name for name in whole.weights if ".layers.1." in name or ".layers.4." in name}
    assert set(partial.weights) == beside | of_layers
    assert all(source == whole.weights[name] for name, source in partial.weights.items())


def test_all_layers_are_no_partial_model(checkpoint: Path) -> None:
    assert load(checkpoint, "0:6") == load(checkpoint)


def test_what_other_layers_lack_does_not_matter(tmp_path: Path) -> None:
    folder = write_checkpoint(tmp_path / "incomplete")
    kept = {name: value for name, value in random_tensors(CONFIG).items() if ".layers.5." not in name}
    save_file(kept, folder / SINGLE)
    assert load(folder, "0:5").config.chosen_layers == (0, 1, 2, 3, 4)
    with pytest.raises(CheckpointError, match=r"backbone\.layers\.5\..* is missing"):
        load(folder, "3,5")


def test_a_tensor_of_no_layer_of_the_model_is_still_too_much(tmp_path: Path) -> None:
    folder = write_checkpoint(tmp_path / "more")
    tensors = random_tensors(CONFIG)
    tensors["backbone.layers.6.norm.weight"] = tensors["backbone.layers.5.norm.weight"].clone()
    save_file(tensors, folder / SINGLE)
    with pytest.raises(
        CheckpointError, match=r"backbone\.layers\.6\.norm\.weight is in the checkpoint, but not"
    ):
        load(folder, "0:2")


def test_a_check_is_of_the_chosen_layers(checkpoint: Path) -> None:
    found = check(read_headers(checkpoint, "1,4"))
    assert found.is_buildable
    assert found.layers == {1: "moe", 4: "mamba"}
    assert {part.kind: part.num_layers for part in found.parts} == {
        "embeddings": 0, "moe": 1, "mamba": 1, "head": 0,
    }  # fmt: skip
    assert "ssm_state" in found.dtypes["mamba"]["float32"]
    assert any(note.startswith("a partial model: layers 1, 4") for note in found.notes)
    assert found.num_parameters < check(read_headers(checkpoint)).num_parameters
