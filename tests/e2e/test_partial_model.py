"""A few layers of a checkpoint through every stage: the bundle runs, is proved, and says that it is partial."""

from __future__ import annotations

import dataclasses
import json
import shutil
from pathlib import Path

import pytest
from checkpoints import write_checkpoint
from click.testing import CliRunner, Result
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from nemotrt.exporter.cli import program
from nemotrt.exporter.config import BuildConfig
from nemotrt.exporter.pipelines import build
from nemotrt.exporter.runtime import manifest as manifests
from nemotrt.exporter.stages.load import load
from nemotrt.exporter.workspace import digest

CHOSEN = (1, 2, 4)
"""Of ME*-ME: an MoE, an attention and a Mamba layer, none in its own place."""


def run(*arguments: object) -> Result:
    return CliRunner().invoke(program, [str(argument) for argument in arguments])


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    folder = write_checkpoint(tmp_path_factory.mktemp("partial") / "checkpoint", vocab_size=len(alphabet))
    tokenizer = Tokenizer(models.BPE({letter: i for i, letter in enumerate(alphabet)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.save(str(folder / "tokenizer.json"))
    return folder


@pytest.fixture(scope="module")
def bundle(whole: Path) -> Path:
    output = whole.parent / "bundle"
    result = run("build", whole, "--output", output, "--layers", "1:3,4", "--runtime", "onnx")
    assert result.exit_code == 0, result.output
    assert "a partial model: layers 1, 2, 4 (the manifest says so)" in result.stderr
    return output


def test_the_manifest_says_which_layers_it_has(bundle: Path) -> None:
    manifest = manifests.verify(bundle, deep=True)
    assert manifest.partial
    assert manifest.model.chosen_layers == CHOSEN
    assert manifest.model.layers == {"moe": 1, "attention": 1, "mamba": 1}
    assert manifest.validation.verdict == "passed"
    # A layer has the index that it has in the checkpoint.
    pools = [pool.name for pool in manifest.graph.pools]
    assert pools == ["kv_cache.2", "conv_state.4", "ssm_state.4"]


def test_the_report_says_that_it_is_partial(bundle: Path) -> None:
    report = json.loads((bundle / "report.json").read_text())
    assert any("a partial model: layers 1, 2, 4" in entry["detail"] for entry in report["not_compared"])
    assert "a partial model: layers 1, 2, 4" in (bundle / "report.html").read_text()
    assert manifests.read(bundle).of_role("report") == ("report.html", "report.json")


def test_it_is_compared_again_with_its_checkpoint_and_without(bundle: Path, whole: Path) -> None:
    assert run("validate", bundle, "--checkpoint", whole).exit_code == 0
    assert run("validate", bundle).exit_code == 0


def test_inspect_shows_its_layers_by_their_own_index(bundle: Path) -> None:
    assert "a partial model: layers 1, 2, 4" in run("inspect", bundle).stdout
    assert "layers.4.mixer.scan" in run("inspect", bundle, "--layer", 4).stdout
    refused = run("inspect", bundle, "--layer", 0)
    assert refused.exit_code == 2
    assert "--layer 0 is not a layer of this model: it has 1, 2, 4" in refused.stderr


def test_it_writes_text_and_says_what_that_is_worth(bundle: Path) -> None:
    result = run("generate", bundle, "--prompt", "the cat", "--max-new-tokens", 3)
    assert result.exit_code == 0, result.output
    assert "this is a partial model: layers 1, 2, 4; its text is meaningless" in result.stderr


def test_a_build_of_other_layers_takes_nothing_from_an_interrupted_one(whole: Path) -> None:
    def key(layers: str) -> str:
        config = BuildConfig(whole, whole.parent / "x", layers=layers)
        return digest(build.identity(config, load(whole, layers)))

    assert len({key(""), key("0:2"), key("0:3")}) == 3


def test_a_bundle_whose_manifest_was_changed_to_other_layers_is_refused(bundle: Path, tmp_path: Path) -> None:
    copy = shutil.copytree(bundle, tmp_path / "copy")
    manifest = manifests.read(copy)
    other = dataclasses.replace(manifest.model, chosen_layers=(0, 2, 4))
    manifests.write(copy, dataclasses.replace(manifest, model=other))
    result = run("validate", copy)
    assert result.exit_code != 0
    assert "has no weight backbone.layers.0." in result.stderr
