"""Bad checkpoints, configurations and flags: one clear line, nothing left behind, nothing of the user's touched."""

from __future__ import annotations

import dataclasses
import os
import re
import shutil
from pathlib import Path

import bad_bundles
import bad_checkpoints
import bad_fp8
import bad_reference_files
import bad_text_files
import fake_gpu
import numpy as np
import pytest
from bad_checkpoints import Case
from bad_places import FLAGS, SPELLINGS
from faults import Graph, broken
from refusals import BUILD, contents, refused, run, small_checkpoint

from nemotrt.exporter.config import BuildConfig
from nemotrt.exporter.runtime import cuda
from nemotrt.exporter.runtime import manifest as manifests

pytestmark = pytest.mark.usefixtures("here")


@pytest.mark.parametrize("name", bad_checkpoints.ALL)
def test_a_bad_checkpoint(tmp_path: Path, name: str) -> None:
    """`build` refuses it before it writes anything."""
    _refused_by_a_build(tmp_path, bad_checkpoints.ALL[name])


@pytest.mark.parametrize("name", bad_fp8.ALL)
def test_a_bad_quantization(tmp_path: Path, name: str) -> None:
    """`build` refuses unsupported quantization, FP8 with invalid scales, and unusable calibration text."""
    _refused_by_a_build(tmp_path, bad_fp8.ALL[name])


@pytest.mark.parametrize("name", bad_text_files.ALL)
def test_a_bad_tokenizer_or_chat_template(tmp_path: Path, name: str) -> None:
    """`build` refuses it before it writes anything."""
    _refused_by_a_build(tmp_path, bad_text_files.ALL[name])


def _refused_by_a_build(tmp_path: Path, case: Case) -> None:
    (tmp_path / "here").mkdir()
    (tmp_path / "here" / "mine.txt").write_text("the user's")
    bad_checkpoints.write(case, tmp_path / "checkpoint")
    before = contents(tmp_path)
    result = run("build", "checkpoint", "--output", "here/out", "--runtime", "onnx", *case.options)
    refused(result, case.says, case.code)
    assert contents(tmp_path) == before


@pytest.mark.parametrize("name", FLAGS)
def test_invalid_flags(tmp_path: Path, name: str) -> None:
    """Refused before anything is read."""
    arguments, says = FLAGS[name]
    small_checkpoint()
    (tmp_path / "other").mkdir()
    for name in ("m.gguf", "m.nemo", "m.bin"):
        (tmp_path / "other" / name).touch()
    os.mkfifo(tmp_path / "other" / "pipe")
    before = contents(tmp_path)
    refused(run(*arguments), says, 2)
    assert contents(tmp_path) == before


@pytest.mark.parametrize("name", bad_bundles.ALL)
def test_a_bad_bundle(tmp_path: Path, bundle: Path, name: str) -> None:
    """`verify` names the problem; `generate` and `validate` refuse the bundle too, unless only hashes reveal it."""
    damage, says = bad_bundles.ALL[name]
    shutil.copytree(bundle, tmp_path / "bundle")
    damage(tmp_path / "bundle")
    before = contents(tmp_path)
    verified = run("verify", "bundle")
    assert verified.exit_code == 7
    assert re.search(says, verified.output), verified.output
    if name not in bad_bundles.SEEN_BY_HASHES_ONLY:
        refused(run("generate", "bundle", "--prompt", "for"), says, 7)
        refused(run("validate", "bundle"), says, 7)
    assert contents(tmp_path) == before


@pytest.mark.parametrize("name", ["config.json", "model.safetensors", "empty.onnx"])
def test_a_file_that_is_not_a_graph(tmp_path: Path, name: str) -> None:
    """`inspect` refuses it with exit 7: `is not a readable ONNX file`, or `it has no node`."""
    small_checkpoint()
    (tmp_path / "checkpoint" / "empty.onnx").touch()
    refused(run("inspect", f"checkpoint/{name}"), f"{name} is not (a readable|an) ONNX file: ", 7)


@pytest.mark.parametrize("name", bad_bundles.PROMPTS)
def test_an_invalid_prompt(tmp_path: Path, bundle: Path, name: str) -> None:
    """`generate` refuses it before it prints a token."""
    options, says = bad_bundles.PROMPTS[name]
    result = run("generate", bundle, *options)
    refused(result, says, 2)
    assert result.stdout == ""


@pytest.mark.parametrize("name", bad_bundles.EVALS)
def test_an_invalid_evaluation_text(tmp_path: Path, bundle: Path, name: str) -> None:
    """`validate --eval` refuses it before it compares anything."""
    file, content, says = bad_bundles.EVALS[name]
    (tmp_path / file).write_bytes(content)
    result = run("validate", bundle, "--eval", file)
    refused(result, says, 2)
    assert "validate  " not in result.stderr


def test_an_evaluation_text_without_a_tokenizer(tmp_path: Path) -> None:
    """`validate --eval` refuses it with exit 2: `has no tokenizer.json, which is needed to read text`."""
    small_checkpoint()
    assert run(*BUILD, "out").exit_code == 0
    refused(
        run("validate", "out", "--eval", "default"), "has no tokenizer.json, which is needed to read text", 2
    )


@pytest.mark.parametrize("name", bad_reference_files.ALL)
def test_a_bad_reference_file(tmp_path: Path, bundle: Path, golden: Path, name: str) -> None:
    """`validate --golden` refuses it before it compares anything."""
    damage, says, code = bad_reference_files.ALL[name]
    shutil.copyfile(golden, tmp_path / "model.golden")
    damage(tmp_path / "model.golden", bundle)
    before = contents(tmp_path)
    result = run("validate", bundle, "--golden", "model.golden")
    refused(result, says, code)
    assert "validate  " not in result.stderr
    assert contents(tmp_path) == before


@pytest.mark.parametrize("name", bad_reference_files.PLACES)
def test_an_unusable_path_for_a_reference_file(tmp_path: Path, bundle: Path, name: str) -> None:
    """`validate --save-golden` refuses it before it compares anything."""
    shutil.copytree(bundle, tmp_path / "bundle")
    shutil.copytree(bundle.parent / "checkpoint", tmp_path / "checkpoint")
    os.mkfifo(tmp_path / "pipe")
    place, says = bad_reference_files.PLACES[name]
    before = contents(tmp_path)
    refused(run("validate", "bundle", "--save-golden", place), says, 2)
    assert contents(tmp_path) == before


@pytest.mark.parametrize("name", bad_reference_files.AGAINST)
def test_bundles_that_cannot_be_compared(tmp_path: Path, bundle: Path, name: str) -> None:
    """`validate --against` refuses them before it compares anything."""
    change, says = bad_reference_files.AGAINST[name]
    shutil.copytree(bundle, tmp_path / "bundle")
    shutil.copytree(bundle, tmp_path / "other")
    manifests.write(tmp_path / "other", change(manifests.read(bundle)))
    result = run("validate", "bundle", "--against", "other")
    refused(result, says, 2)
    assert "validate  " not in result.stderr


@pytest.mark.parametrize("reference", ["golden", "checkpoint", "against"])
def test_a_bundle_that_computes_nan(tmp_path: Path, bundle: Path, golden: Path, reference: str) -> None:
    """`validate` exits with 8: `values are not finite`. It never passes. A failed gate exits with 6."""
    shutil.copytree(bundle, tmp_path / "bundle")
    broken(tmp_path / "bundle" / "model.onnx", one_nan)
    restore = manifests.read(bundle)
    roles = {file.path: file.role for file in restore.files}
    files = manifests.describe_files(tmp_path / "bundle", roles)
    manifests.write(tmp_path / "bundle", dataclasses.replace(restore, files=files))
    against = {"golden": golden, "checkpoint": bundle.parent / "checkpoint", "against": bundle}[reference]
    options = ("--drift-steps", "0") if reference == "checkpoint" else ()
    refused(run("validate", "bundle", f"--{reference}", against, *options), "values are not finite", 8)


@pytest.mark.parametrize("command", ["build", "validate"])
def test_a_checkpoint_that_computes_nan(tmp_path: Path, command: str) -> None:
    """Its finite weights overflow in PyTorch too: exit 8, `values of the reference are not finite`."""
    overflowing = bad_checkpoints.replaced("up_proj.weight", lambda values: values * 1e25)
    bad_checkpoints.write(
        dataclasses.replace(bad_checkpoints.GOOD, damage=overflowing), tmp_path / "checkpoint"
    )
    small = ("--max-context", "128", "--max-tokens", "16", "--max-sequences", "2")
    arguments: tuple[str, ...] = (*BUILD[:2], "--runtime", "onnx", *small, "--output", "out")
    if command == "validate":
        assert run(*BUILD, "out", *small).exit_code == 0
        arguments = ("validate", "out", "--checkpoint", "checkpoint", "--drift-steps", "0")
    refused(run(*arguments), "values of the reference are not finite", 8)
    assert (tmp_path / "out").exists() == (command == "validate")


def one_nan(graph: Graph) -> None:
    graph.weight("lm_head.weight")[5, 7] = np.nan


def test_an_engine_without_a_gpu(
    tmp_path: Path, bundle: Path, golden: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`validate --engine` refuses it with exit 2: `an engine runs on a GPU only`."""
    shutil.copytree(bundle, tmp_path / "bundle")
    fake_gpu.add_engine(tmp_path / "bundle", BuildConfig(bundle, bundle))

    def no_library(name: str) -> None:
        raise OSError(name)

    monkeypatch.setattr(cuda.ctypes, "CDLL", no_library)
    refused(run("validate", "bundle", "--engine", "--golden", golden), "an engine runs on a GPU only", 2)


def test_a_bundle_without_an_engine(bundle: Path) -> None:
    """`validate --engine` refuses it with exit 7: `has no TensorRT engine`."""
    refused(run("validate", bundle, "--engine"), "has no TensorRT engine", 7)


def test_force_replaces_a_bundle(tmp_path: Path, bundle: Path) -> None:
    """`--force` replaces a bundle, even a damaged one, completely."""
    shutil.copytree(bundle, tmp_path / "out")
    (tmp_path / "out" / "model.onnx").unlink()
    small_checkpoint()
    assert run(*BUILD, "out", "--force").exit_code == 0
    assert run("verify", "out").exit_code == 0
    assert sorted(os.listdir(tmp_path)) == ["checkpoint", "out"]


@pytest.mark.parametrize("output", SPELLINGS.values(), ids=SPELLINGS)
def test_unusual_output_paths(tmp_path: Path, output: str) -> None:
    """The build succeeds and the bundle is complete."""
    small_checkpoint()
    before = contents(tmp_path / "checkpoint")
    assert run(*BUILD, output).exit_code == 0
    assert run("verify", output).exit_code == 0
    after = contents(tmp_path / "checkpoint")
    assert {name: after[name] for name in before} == before


def test_a_checkpoint_without_a_tokenizer(tmp_path: Path) -> None:
    """The build succeeds. `generate` refuses text for this bundle with exit 7: `has no tokenizer.json`."""
    small_checkpoint()
    assert "there is no tokenizer.json" in run("check", "checkpoint").output
    assert run(*BUILD, "out").exit_code == 0
    refused(run("generate", "out", "--prompt", "for"), "has no tokenizer.json, which is needed for text", 7)
