"""Bad checkpoints, configurations and flags: one clear line, nothing left behind, nothing of the user's touched."""

from __future__ import annotations

import dataclasses
import hashlib
import os
import re
import resource
import shutil
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import bad_bundles
import bad_checkpoints
import bad_fp8
import bad_reference_files
import bad_text_files
import fake_gpu
import numpy as np
import pytest
import torch
from bad_checkpoints import Case
from bad_places import FLAGS, PLACES, SPELLINGS
from click.testing import CliRunner, Result
from faults import Graph, broken

from nemotrt.exporter.cli import program
from nemotrt.exporter.config import BuildConfig
from nemotrt.exporter.lowering import external_data
from nemotrt.exporter.runtime import cuda
from nemotrt.exporter.runtime import manifest as manifests
from nemotrt.exporter.workspace import Workspace

NOBODY = 65534
"""The user without rights, on every Linux."""


def run(*arguments: object) -> Result:
    """The command in this process; only an exit is an answer."""
    result = CliRunner().invoke(program, [str(argument) for argument in arguments])
    assert result.exception is None or isinstance(result.exception, SystemExit), result.exc_info
    return result


def contents(folder: Path) -> dict[str, str]:
    """Everything below the folder: a file's hash, a link's target."""
    found = {}
    for path in sorted(folder.rglob("*")):
        name = str(path.relative_to(folder))
        if path.is_symlink():
            found[name] = f"link to {os.readlink(path)}"
        else:
            kinds = {path.is_dir(): "folder", path.is_fifo(): "pipe"}
            found[name] = kinds.get(True) or digest(path)
    return found


def digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def refused(result: Result, says: str, code: int) -> None:
    """One line that begins with `error:` and holds `says`, at most one line of advice, and the exit code."""
    assert result.exit_code == code, result.output
    lines = [line for line in result.stderr.splitlines() if line.startswith("error: ")]
    assert len(lines) == 1, result.stderr
    assert re.search(says, lines[0]), lines[0]
    after = result.stderr.split(lines[0])[1].splitlines()[1:]
    assert len(after) <= 1, result.stderr
    assert all(line.startswith("  ") for line in after), result.stderr
    assert "Traceback" not in result.stderr


@pytest.fixture(autouse=True)
def _here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Relative paths are below the test's own folder: whatever is written by mistake is seen there."""
    monkeypatch.chdir(tmp_path)


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


ONNX = ("--runtime", "onnx", "--no-validate")
BUILD = ("build", "checkpoint", *ONNX, "--output")


def small_checkpoint() -> None:
    """A good checkpoint at `checkpoint`."""
    bad_checkpoints.write(bad_checkpoints.GOOD, Path("checkpoint"))


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


@pytest.mark.parametrize("name", PLACES)
def test_an_unusable_output_path(tmp_path: Path, name: str) -> None:
    """`build` refuses it and leaves existing files unchanged."""
    prepare, output, says = PLACES[name]
    small_checkpoint()
    prepare(tmp_path)
    before = contents(tmp_path)
    refused(run(*BUILD, output, *(["--force"] if name.startswith("force-") else [])), says, 2)
    assert contents(tmp_path) == before


def test_two_builds_into_one_output(tmp_path: Path) -> None:
    """The second build is refused with exit 2: `another build is writing …`; the first continues."""
    small_checkpoint()
    with Workspace.open(tmp_path / "out", force=False) as other:
        (other.folder / "model.onnx").write_text("the other build's")
        before = contents(tmp_path)
        refused(run(*BUILD, "out"), "another build is writing .*out", 2)
        assert contents(tmp_path) == before


@pytest.fixture
def nobody(bundle: Path) -> Iterator[Path]:
    """A folder, and a process without rights beyond its owner's: the superuser may write anywhere."""
    del bundle  # building it has imported what nobody may not be allowed to read
    folder = Path(tempfile.mkdtemp())
    is_root = os.geteuid() == 0
    if is_root:
        os.chown(folder, NOBODY, NOBODY)
        os.seteuid(NOBODY)
    try:
        yield folder
    finally:
        if is_root:
            os.seteuid(0)
        for path in [folder, *folder.rglob("*")]:
            path.chmod(0o700)
        shutil.rmtree(folder)


def test_a_read_only_folder(nobody: Path) -> None:
    """Refused with exit 2: `Permission denied`."""
    bad_checkpoints.write(bad_checkpoints.GOOD, nobody / "checkpoint")
    (nobody / "here").mkdir(mode=0o555)
    result = run("build", nobody / "checkpoint", *ONNX, "--output", nobody / "here" / "out")
    refused(result, "here/.out.building: Permission denied", 2)
    assert os.listdir(nobody / "here") == []


def test_a_checkpoint_without_read_permission(nobody: Path) -> None:
    """Refused with exit 2: `Permission denied`, and the file's name."""
    bad_checkpoints.write(bad_checkpoints.GOOD, nobody / "checkpoint")
    (nobody / "checkpoint" / "model.safetensors").chmod(0)
    result = run("build", nobody / "checkpoint", *ONNX, "--output", nobody / "out")
    refused(result, r"checkpoint/model\.safetensors: Permission denied", 2)
    assert os.listdir(nobody) == ["checkpoint"]


@pytest.mark.parametrize("name", ["model.onnx", "model.onnx.data", "config.json", "manifest.json"])
def test_a_bundle_without_read_permission(nobody: Path, name: str) -> None:
    """`verify`, `generate` and `validate` refuse it with exit 7 and name the file."""
    bad_checkpoints.write(bad_checkpoints.GOOD, nobody / "checkpoint")
    copy = nobody / "bundle"
    assert run("build", nobody / "checkpoint", *ONNX, "--output", copy).exit_code == 0
    (copy / name).chmod(0)
    for command in (("verify", copy), ("generate", copy, "--prompt", "for"), ("validate", copy)):
        refused(run(*command), f"bundle/{name} cannot be read", 7)


def test_a_disk_that_fills_up_while_weights_are_written(tmp_path: Path) -> None:
    """Refused with exit 2; what was written is removed."""
    small_checkpoint()
    before = contents(tmp_path)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, hard))  # the system refuses the write that goes beyond
    try:
        result = run(*BUILD, "out")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    refused(result, "File too large", 2)
    assert contents(tmp_path) == before


@pytest.fixture
def mounted(tmp_path: Path) -> Iterator[Callable[[int], Path]]:
    """Mounts a file system of so many bytes."""
    place = tmp_path / "disk"
    place.mkdir()

    def mount(num_bytes: int) -> Path:
        command = ["mount", "-t", "tmpfs", "-o", f"size={num_bytes}", "none", str(place)]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode:
            pytest.skip(f"no file system can be mounted here: {done.stderr.strip()}")
        return place

    yield mount
    subprocess.run(["umount", str(place)], capture_output=True, check=False)


def test_a_disk_that_is_too_small(mounted: Callable[[int], Path]) -> None:
    """Refused with exit 2 before any weight is written; the error states the free and the required space."""
    small_checkpoint()
    place = mounted(8192)
    refused(run(*BUILD, place / "out"), "GB free, the bundle needs .* GB", 2)
    assert os.listdir(place) == []


def test_a_disk_with_room_for_the_weights_only(mounted: Callable[[int], Path]) -> None:
    """Refused with exit 2: `No space left on device`."""
    small_checkpoint()
    place = mounted(45_056)
    refused(run(*BUILD, place / "out"), "No space left on device", 2)
    assert os.listdir(place) == []


def test_a_disk_that_another_program_fills(
    mounted: Callable[[int], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Refused with exit 2 while weights are written: `No space left on device`; what was written is removed."""
    small_checkpoint()
    place = mounted(1 << 20)
    write = external_data._write
    written: list[int] = []

    def fill_and_write(target: int, values: torch.Tensor, offset: int) -> int:
        written.append(offset)
        if len(written) > 5 and not (place / "other").exists():
            (place / "other").write_bytes(bytes(shutil.disk_usage(place).free))
        return write(target, values, offset)

    monkeypatch.setattr(external_data, "_write", fill_and_write)
    refused(run(*BUILD, place / "out"), "No space left on device", 2)
    assert len(written) > 5
    assert os.listdir(place) == ["other"]


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
