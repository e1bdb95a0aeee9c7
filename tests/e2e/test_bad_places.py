"""Places where no bundle can be written: outputs, permissions and disks."""

from __future__ import annotations

import os
import resource
import shutil
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import bad_checkpoints
import pytest
import torch
from bad_places import PLACES
from refusals import BUILD, ONNX, contents, refused, run, small_checkpoint

from nemotrt.exporter.lowering import external_data
from nemotrt.exporter.workspace import Workspace

pytestmark = pytest.mark.usefixtures("here")

NOBODY = 65534
"""The user without rights, on every Linux."""


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
