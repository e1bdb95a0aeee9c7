"""The wheel that carries the plugin library: what it may need of a system, and what an installation makes of it."""

from __future__ import annotations

import json
import platform
import shutil
import subprocess
import sys
import zipfile
from importlib.util import find_spec
from pathlib import Path

import make_wheel
import pytest
from host_library import index, library

from nemotrt.exporter.config import BuildConfig
from nemotrt.exporter.engines import plugin_library as choice
from nemotrt.exporter.engines import targets
from nemotrt.exporter.errors import CompileError
from nemotrt.plugins import library as libraries
from nemotrt.plugins.kernel_index import KernelError
from nemotrt.plugins.link import DESCRIPTION_NAME, LIBRARY_NAME

ARCHITECTURE = platform.machine()
CONFIG = BuildConfig(Path("checkpoint"), Path("bundle"), precision="fp16")


def compiled(folder: Path, name: str, *arguments: str) -> Path:
    """A shared library of one C function."""
    source = folder / f"{name}.cpp"
    source.write_text('extern "C" int one() { return 1; }\n')
    path = folder / name
    command = ["g++", "-shared", "-fPIC", str(source), f"-Wl,-soname,{name}", "-o", str(path), *arguments]
    subprocess.run(command, check=True)
    return path


# What a library may need


def test_the_tag_says_the_c_library_that_is_needed() -> None:
    tag = make_wheel.platform_tag(library().path, ARCHITECTURE)
    prefix, minor, *_ = tag.removeprefix("manylinux_").split("_")
    assert prefix == "2"
    assert int(minor) >= 17
    said = make_wheel._readelf(library().path)
    assert f"GLIBC_2.{minor}" in said or minor == "17"
    assert f"GLIBC_2.{int(minor) + 1}" not in said


@pytest.mark.parametrize(
    "name", ["libcudart.so.13", "libnvinfer.so.11", "libpython3.11.so.1.0", "libstdc++.so.9"]
)
def test_a_library_that_needs_more_than_the_system_is_refused(tmp_path: Path, name: str) -> None:
    needed = compiled(tmp_path, name)
    needy = compiled(tmp_path, "needy.so", "-Wl,--no-as-needed", str(needed))
    with pytest.raises(KernelError, match=f"needs .*{name}".replace("+", r"\+")):
        make_wheel.platform_tag(needy, ARCHITECTURE)


def test_a_library_for_another_machine_is_refused() -> None:
    other = next(name for name in make_wheel.ARCHITECTURES if name != ARCHITECTURE)
    with pytest.raises(KernelError, match=f"is not for {other}"):
        make_wheel.platform_tag(library().path, other)


def test_a_library_that_is_too_large_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(make_wheel, "MAX_BYTES", 1000)
    with pytest.raises(KernelError, match="a wheel may have"):
        make_wheel.platform_tag(library().path, ARCHITECTURE)


def test_what_is_no_library_is_refused(tmp_path: Path) -> None:
    (tmp_path / "x.so").write_text("no library")
    with pytest.raises(KernelError, match="is not a library"):
        make_wheel.platform_tag(tmp_path / "x.so", ARCHITECTURE)


@pytest.mark.slow
@pytest.mark.parametrize("architecture", list(make_wheel.ARCHITECTURES))
@pytest.mark.skipif(
    find_spec("ziglang") is None, reason="wheels are linked by Zig's compiler: pip install --group wheel"
)
def test_it_is_linked_for_old_systems_of_both_kinds(tmp_path: Path, architecture: str) -> None:
    path = make_wheel.make(architecture, index(), tmp_path / "library", tmp_path)
    assert path.name.endswith(f"-py3-none-manylinux_2_17_{architecture}.whl")


# What an installation has


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A wheel with the library whose kernels are names, unpacked as an installer does."""
    folder = tmp_path_factory.mktemp("wheel")
    tag = make_wheel.platform_tag(library().path, ARCHITECTURE)
    path = make_wheel.wheel(library().path, tag, folder)
    assert path.name.endswith(f"-py3-none-{tag}.whl")
    with zipfile.ZipFile(path) as content:
        content.extractall(folder / "site")
    return folder / "site"


@pytest.mark.slow
def test_an_installed_wheel_has_its_library_and_loads_it(installed: Path) -> None:
    says = (
        "import json; from nemotrt.plugins.library import shipped_library;"
        " found = shipped_library(); print(json.dumps([str(found.path), found.description]))"
    )
    command = [sys.executable, "-P", "-c", says]
    environment = {"PYTHONPATH": str(installed), "PATH": "/nowhere"}
    result = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    path, description = json.loads(result.stdout)
    assert Path(path) == installed / "nemotrt" / "plugins" / "prebuilt" / LIBRARY_NAME
    assert description == library().description


@pytest.fixture
def prebuilt(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An installation's own library."""
    folder = tmp_path / "prebuilt"
    folder.mkdir()
    for name in (LIBRARY_NAME, DESCRIPTION_NAME):
        shutil.copy(library().path.parent / name, folder)
    monkeypatch.setattr(libraries, "PREBUILT", folder)
    return folder


@pytest.fixture
def no_compiler(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(choice, "_linked", lambda *_: pytest.fail("it was compiled"))
    monkeypatch.setattr("shutil.which", lambda name: None)
    monkeypatch.setattr(targets, "find_spec", lambda name: None)


@pytest.mark.usefixtures("no_compiler")
def test_the_shipped_library_needs_no_compiler(prebuilt: Path) -> None:
    targets.check_can_link()
    found = choice.plugin_library(CONFIG, (89, 120))
    assert found.path == prebuilt / LIBRARY_NAME
    assert found.description["hash"] == library().description["hash"]


@pytest.mark.usefixtures("no_compiler")
def test_without_it_a_compiler_is_asked_for() -> None:
    with pytest.raises(CompileError, match="needs Triton"):
        targets.check_can_link()


def test_a_gpu_that_it_has_no_kernels_for_is_compiled_for(
    prebuilt: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    linked = object()
    monkeypatch.setattr(choice, "_linked", lambda *_: linked)
    assert choice.plugin_library(CONFIG, (89, 999)) is linked


def changed_byte(folder: Path) -> None:
    content = bytearray((folder / LIBRARY_NAME).read_bytes())
    content[-1] ^= 1
    (folder / LIBRARY_NAME).write_bytes(content)


def edited(folder: Path, **fields: str) -> None:
    note = json.loads((folder / DESCRIPTION_NAME).read_text())
    (folder / DESCRIPTION_NAME).write_text(json.dumps(note | fields))


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (changed_byte, "has changed since it was installed"),
        (lambda folder: (folder / LIBRARY_NAME).unlink(), "is damaged"),
        (lambda folder: (folder / DESCRIPTION_NAME).write_text("{"), "is damaged"),
        (lambda folder: edited(folder, version="9.9.9"), r"belongs to nemo-export 9\.9\.9, not to"),
        (lambda folder: edited(folder, hash="0" * 64), "is build .*, but build 000000000000 is required"),
    ],
    ids=["changed byte", "no library", "broken description", "other version", "other build"],
)
@pytest.mark.usefixtures("no_compiler")
def test_a_shipped_library_that_was_changed_is_not_loaded(
    prebuilt: Path, damage: object, message: str
) -> None:
    damage(prebuilt)  # type: ignore[operator]
    with pytest.raises(CompileError, match=message):
        choice.plugin_library(CONFIG, (89,))
