"""The plugin library needs nothing, refuses what does not fit, and TensorRT-RTX builds engines with it."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from host_library import FOLDER, ROOT, SPECS, driver, index, library, shapes_of

from nemotrt.plugins import link as linking
from nemotrt.plugins.kernel_index import KernelError, KernelIndex
from nemotrt.plugins.library import PluginError, PluginLibrary
from nemotrt.plugins.link import HEADERS_VARIABLE, Toolchain, find_headers, link

SCALE = {"scale": 0.125}
CONV = {"T": 5, "B": 2, "C": 64, "K": 4, "S": 3}


def linked() -> Path:
    return library().path


def needed(path: Path) -> set[str]:
    text = subprocess.run(["readelf", "-d", path], check=True, capture_output=True, text=True).stdout
    return set(re.findall(r"\(NEEDED\).*\[(.*)\]", text))


# What the library is


def test_it_needs_nothing_but_the_c_library() -> None:
    assert {name.partition(".")[0] for name in needed(linked())} <= {
        "libc",
        "libdl",
        "libpthread",
        "libm",
        "ld-linux-x86-64",
    }


def test_it_exports_its_entry_points_and_nothing_else() -> None:
    text = subprocess.run(
        ["nm", "-D", "--defined-only", linked()], check=True, capture_output=True, text=True
    )
    names = {line.split()[-1] for line in text.stdout.splitlines()}
    assert names == {
        *("getCreators", "setLoggerFinder", "nemo_plugin_describe"),
        *(
            f"nemo_plugin_test_{part}"
            for part in ("errors", "driver", "create", "destroy", "shape", "enqueue", "launches")
        ),
    }


def test_it_says_what_it_is() -> None:
    said = library().description
    note = json.loads((linked().parent / "libnemo_plugins.json").read_text())
    assert {key: note[key] for key in said} == said
    assert said["sms"] == [80, 86, 89, 90, 100, 120]
    assert said["num_kernels"] == len(index().kernels)
    assert re.fullmatch(r"[0-9a-f]{64}", said["hash"])


# Linking


def small(folder: Path) -> KernelIndex:
    """An index of one kernel an op, so that linking is quick; its folder may be changed."""
    kernels = []
    for op in SPECS:
        kernel = next(kernel for kernel in index().kernels if (kernel.op, kernel.sm) == (op, 90))
        (folder / kernel.file).parent.mkdir(parents=True)
        shutil.copy(index().folder / kernel.file, folder / kernel.file)
        kernels.append(kernel)
    return KernelIndex(folder, "none", tuple(kernels))


@pytest.fixture(scope="module")
def small_library(tmp_path_factory: pytest.TempPathFactory) -> PluginLibrary:
    """The library that is linked from the small index."""
    folder = tmp_path_factory.mktemp("small")
    link(small(folder / "kernels"), folder / "out", Toolchain())
    return PluginLibrary(folder / "out" / "libnemo_plugins.so")


@pytest.fixture
def no_compiling(monkeypatch: pytest.MonkeyPatch) -> None:
    def run(*_: Any) -> None:
        pytest.fail("it was compiled again")

    linked()  # compiled once, before the test
    monkeypatch.setattr(linking, "_run", run)


@pytest.mark.usefixtures("no_compiling")
def test_nothing_is_compiled_twice() -> None:
    before = linked().stat().st_mtime_ns
    link(index(), linked().parent, Toolchain())
    assert linked().stat().st_mtime_ns == before


@pytest.mark.usefixtures("no_compiling")
@pytest.mark.parametrize("change", ["kernels", "compiler", "library", "note"])
def test_a_change_links_again(tmp_path: Path, change: str) -> None:
    for name in ("libnemo_plugins.so", "libnemo_plugins.json"):
        shutil.copy(linked().parent / name, tmp_path / name)
    changed, toolchain = index(), Toolchain()
    if change == "kernels":
        first = replace(changed.kernels[0], shared=changed.kernels[0].shared + 1)
        changed = replace(changed, kernels=(first, *changed.kernels[1:]))
    elif change == "compiler":
        toolchain = Toolchain(sanitize=True)
    elif change == "library":
        with (tmp_path / "libnemo_plugins.so").open("ab") as file:
            file.write(b"x")
    else:
        (tmp_path / "libnemo_plugins.json").write_text("{")
    with pytest.raises(pytest.fail.Exception, match="compiled again"):
        link(changed, tmp_path, toolchain)


def test_a_changed_cubin_is_refused(tmp_path: Path) -> None:
    found = small(tmp_path / "kernels")
    (found.folder / found.kernels[0].file).write_bytes(b"other")
    with pytest.raises(KernelError, match="has changed since it was compiled"):
        link(found, tmp_path / "out", Toolchain())
    assert not (tmp_path / "out").exists()


def test_a_compilers_failure_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(linking, "WARNINGS", ())
    broken = tmp_path / "broken.cpp"
    broken.write_text("int main() { return nothing; }\n")
    monkeypatch.setattr(linking, "host_sources", lambda: [broken])
    monkeypatch.setattr(linking, "SOURCES", tmp_path)
    (tmp_path / "host").mkdir()
    shutil.copy(ROOT / "plugins" / "host" / "exports.map", tmp_path / "host")
    with pytest.raises(
        KernelError, match=r"g\+\+ failed: .*broken\.cpp:1:.*error: 'nothing' was not declared"
    ) as caught:
        link(small(tmp_path / "kernels"), tmp_path / "out", Toolchain())
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "out").exists()


def test_a_missing_compiler_is_named(tmp_path: Path) -> None:
    with pytest.raises(KernelError, match=r"compiler nothing-g\+\+ is not installed"):
        link(small(tmp_path / "kernels"), tmp_path / "out", Toolchain("nothing-g++"))


def test_the_library_has_the_kernels_it_is_linked_from(small_library: PluginLibrary) -> None:
    assert small_library.description["num_kernels"] == len(SPECS)
    assert small_library.description["sms"] == [90]


ARM_COMPILER = "aarch64-linux-gnu-g++"
needs_arm_compiler = pytest.mark.skipif(
    not shutil.which(ARM_COMPILER), reason=f"no {ARM_COMPILER}: install g++-aarch64-linux-gnu"
)


@pytest.mark.slow
@needs_arm_compiler
def test_it_links_for_64_bit_arm(tmp_path: Path) -> None:
    found = link(small(tmp_path / "kernels"), tmp_path / "out", Toolchain(ARM_COMPILER))
    header = subprocess.run(["readelf", "-h", found], check=True, capture_output=True, text=True).stdout
    assert "AArch64" in header
    assert {name.partition(".")[0] for name in needed(found)} <= {"libc", "libdl", "ld-linux-aarch64"}


@pytest.mark.slow
@needs_arm_compiler
@pytest.mark.skipif(not shutil.which("qemu-aarch64"), reason="no qemu-aarch64: install qemu-user")
def test_it_is_loaded_on_64_bit_arm(tmp_path: Path) -> None:
    found = link(small(tmp_path / "kernels"), tmp_path / "out", Toolchain(ARM_COMPILER))
    probe = str(tmp_path / "probe")
    subprocess.run(
        [ARM_COMPILER, Path(__file__).with_name("load_library.cpp"), "-o", probe, "-ldl"], check=True
    )
    command = ["qemu-aarch64", "-L", "/usr/aarch64-linux-gnu", probe, found]
    said = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    count, _, description = said.partition("\n")
    assert int(count) == len(SPECS)
    assert (
        json.loads(description).items()
        <= json.loads(found.with_name("libnemo_plugins.json").read_text()).items()
    )


# TensorRT's headers


def headers(folder: Path, version: str) -> Path:
    folder.mkdir(parents=True)
    (folder / "NvInferRuntime.h").write_text("")
    (folder / "NvInferVersion.h").write_text(version)
    return folder


OLD = "#define TRT_MAJOR_ENTERPRISE 10\n#define TRT_MINOR_ENTERPRISE 14\n"
NEW = "#define TRT_MAJOR_ENTERPRISE 11\n#define TRT_MINOR_ENTERPRISE 1\n"
RTX = "#define TRT_MAJOR_RTX 1\n#define TRT_MINOR_RTX 7\n"


def test_headers_are_found_where_they_are_named_or_in_the_system(tmp_path: Path) -> None:
    old, new, rtx = (headers(tmp_path / str(i), text) for i, text in enumerate((OLD, NEW, RTX)))
    assert find_headers({HEADERS_VARIABLE: str(new)}, [str(rtx)]) == new
    assert find_headers({}, [str(tmp_path), str(old), str(rtx)]) == rtx
    assert find_headers({}, [str(old)]) is None
    assert linking.headers_version(new) == "TensorRT 11.1"
    assert linking.headers_version(rtx) == "TensorRT-RTX 1.7"


def test_headers_that_were_named_must_do(tmp_path: Path) -> None:
    old = headers(tmp_path / "old", OLD)
    with pytest.raises(
        KernelError, match=r"headers of TensorRT 10\.14: TensorRT 11 or TensorRT-RTX is required"
    ):
        find_headers({HEADERS_VARIABLE: str(old)}, [])
    with pytest.raises(KernelError, match=r"has no NvInferRuntime\.h"):
        find_headers({HEADERS_VARIABLE: str(tmp_path / "nothing")}, [])


def test_the_host_compiles_against_nvidias_headers(tmp_path: Path) -> None:
    try:
        found = find_headers(os.environ)
    except KernelError as error:
        pytest.skip(str(error))
    if found is None:
        pytest.skip(f"no TensorRT headers in the system's folders: name theirs in {HEADERS_VARIABLE}")
    built = link(small(tmp_path / "kernels"), tmp_path / "out", Toolchain(headers=found))
    assert PluginLibrary(built).description["headers"].startswith("TensorRT")
    assert PluginLibrary(built).plugin(SPECS["causal_conv1d"], {})


# Loading


def test_another_build_is_refused() -> None:
    with pytest.raises(PluginError, match=r"is build [0-9a-f]{12}, but build ffffffffffff is required: use"):
        PluginLibrary(linked(), expected_hash="f" * 64)
    PluginLibrary(linked(), expected_hash=library().description["hash"])


def test_other_ops_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("nemotrt.plugins.library.specs_digest", lambda _: "other")
    with pytest.raises(PluginError, match="not of this one: link it again"):
        PluginLibrary(linked())


def test_what_is_no_library_is_refused(tmp_path: Path) -> None:
    (tmp_path / "text.so").write_text("no library")
    with pytest.raises(PluginError, match="cannot be loaded"):
        PluginLibrary(tmp_path / "text.so")
    with pytest.raises(PluginError, match="is not a plugin library of nemo-export"):
        PluginLibrary(driver().path)


# Creating and shaping


def test_a_missing_attribute_is_refused() -> None:
    with pytest.raises(
        PluginError, match=r"^NemoPagedAttention layers\.4\.mixer: attribute scale is missing$"
    ):
        library().plugin(SPECS["paged_attention"], {}, "layers.4.mixer")


def test_an_unknown_attribute_is_refused() -> None:
    with pytest.raises(PluginError, match="there is no attribute scales"):
        library().plugin(SPECS["paged_attention"], SCALE | {"scales": 1.0})


def test_an_attribute_of_another_type_is_refused() -> None:
    with pytest.raises(PluginError, match="attribute scale must be a single float"):
        library().plugin(SPECS["paged_attention"], {"scale": 1})


def test_an_unknown_op_is_refused() -> None:
    with pytest.raises(PluginError, match="there is no op NemoNothing"):
        library().plugin(replace(SPECS["paged_attention"], name="NemoNothing"), SCALE)


@pytest.mark.parametrize(
    ("tensor", "shape", "message"),
    [
        (0, ("float16", (5, 64, 1)), "^NemoCausalConv1d: x has 3 axes, expected 2$"),
        (1, ("float16", (63, 4)), r"weight has shape \[63, 4\], expected \[C, K\] with C = 64"),
        (3, ("float16", (3, 64, 2)), r"conv_state has shape \[3, 64, 2\], expected \[S, C, K-1\] with K = 4"),
        (4, ("int32", (0,)), r"query_start has shape \[0\], expected \[B\+1\]"),
        (5, ("int32", (3,)), r"context_len has shape \[3\], expected \[B\] with B = 2"),
        (1, ("float32", (64, 4)), "weight is float32, expected x's float16"),
        (0, ("int32", (5, 64)), "x is int32, which NemoCausalConv1d does not support"),
        (6, ("int64", (2,)), "slot is int64, expected int32"),
    ],
)
def test_a_tensor_that_does_not_fit_is_named(tensor: int, shape: Any, message: str) -> None:
    shapes = shapes_of(SPECS["causal_conv1d"], CONV, {"X": "float16"})
    shapes[tensor] = shape
    with pytest.raises(PluginError, match=message):
        library().plugin(SPECS["causal_conv1d"], {}).shape(shapes)


def test_a_missing_input_is_named() -> None:
    shapes = shapes_of(SPECS["causal_conv1d"], CONV, {"X": "float16"})
    with pytest.raises(PluginError, match="has 6 inputs, expected 7"):
        library().plugin(SPECS["causal_conv1d"], {}).shape(shapes[:-1])


def test_an_sm_without_fp8_is_named() -> None:
    sizes = {"T": 3, "B": 2, "Q": 4, "V": 2, "D": 64, "K": 5, "page": 64, "M": 4}
    plugin = library().plugin(SPECS["paged_attention"], SCALE)
    plugin.shape(shapes_of(SPECS["paged_attention"], sizes, {"X": "float16", "CACHE": "float8_e4m3fn"}))
    with pytest.raises(PluginError, match="SM 80 has no FP8 tensor cores: use float16 or bfloat16"):
        plugin.launches(80)


def test_kernels_that_were_left_out_are_named(small_library: PluginLibrary) -> None:
    plugin = small_library.plugin(SPECS["causal_conv1d"], {})
    plugin.shape(shapes_of(SPECS["causal_conv1d"], CONV | {"K": 3}, {"X": "float32"}))
    with pytest.raises(PluginError, match=r"built without kernel conv_.* for SM 90, TAPS 3, X in float32"):
        plugin.launches(90)


def test_outputs_are_the_specs() -> None:
    sizes = {"T": 3, "B": 2, "Q": 4, "V": 2, "D": 64, "K": 5, "page": 64, "M": 4}
    shapes = (
        library()
        .plugin(SPECS["paged_attention"], SCALE)
        .shape(shapes_of(SPECS["paged_attention"], sizes, {"X": "bfloat16", "CACHE": "float8_e4m3fn"}))
    )
    assert shapes.outputs == (("bfloat16", (3, 4, 64)), ("float8_e4m3fn", (5, 2, 2, 64, 64)))
    assert shapes.aliases == (-1, 3)


# Sanitisers


def compilers_file(name: str) -> str:
    """Where g++ has one of its own libraries; the bare name where it has not."""
    command = ["g++", f"-print-file-name={name}"]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()


@pytest.mark.slow
def test_nothing_that_the_sanitisers_see_is_wrong() -> None:
    runtimes = [compilers_file("libasan.so"), compilers_file("libstdc++.so")]
    if not Path(runtimes[0]).is_absolute():
        pytest.skip("g++ has no address sanitiser: install libasan")
    built = link(index(), FOLDER / "sanitized", Toolchain(sanitize=True))
    environment = os.environ | {
        "LD_PRELOAD": " ".join(runtimes),
        "ASAN_OPTIONS": "detect_leaks=0",  # Python's own
        "PYTHONPATH": str(ROOT / "tests"),
        "PYTHONMALLOC": "malloc",
    }
    command = [
        sys.executable,
        str(Path(__file__).parent / "exercise_host.py"),
        str(built),
        str(driver().path),
    ]
    result = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr[-4000:]
    assert "launched" in result.stdout
