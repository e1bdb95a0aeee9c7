"""Kernels are compiled without a GPU, once, and land with what a launch needs."""

from __future__ import annotations

import importlib.metadata
import os
import re
import shutil
import struct
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import make_plugin_library
import pytest
from click.testing import CliRunner

from nemotrt.plugins import build as building
from nemotrt.plugins.build import build, kernels_with_ptx
from nemotrt.plugins.compile_workers import Workers
from nemotrt.plugins.kernel_index import Kernel, KernelError, KernelIndex
from nemotrt.plugins.kernel_store import cache_folder
from nemotrt.plugins.variant import SMS, Variant

pytest.importorskip("triton", reason="compiling kernels needs Triton: install nemo-export[kernels]")

TOY = """
import triton
import triton.language as tl
from nemotrt.plugins.variant import Variant, supports_fp8

@triton.jit
def scale(x, factor, N, y, BLOCK: tl.constexpr):
    index = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(y + index, (tl.load(x + index, mask=index < N) * factor).to(y.dtype.element_ty), mask=index < N)

@triton.jit
def product(a, b, c, SIZE: tl.constexpr):
    index = tl.arange(0, SIZE)[:, None] * SIZE + tl.arange(0, SIZE)[None, :]
    tl.store(c + index, tl.dot(tl.load(a + index), tl.load(b + index)))

def variants(sm):
    for dtype in ("fp32", "fp16", "bf16"):
        signature = {"x": f"*{dtype}", "factor": "fp32", "N": "i32", "y": f"*{dtype}"}
        yield Variant("scale", signature, {"BLOCK": 256}, 4, 1, ("x", "y", "N"))
    for dtype in ("fp16", "fp8e4nv") if supports_fp8(sm) else ("fp16",):
        signature = {"a": f"*{dtype}", "b": f"*{dtype}", "c": "*fp32"}
        yield Variant("product", signature, {"SIZE": 64}, 4, 2, ("a", "b", "c"))
"""

Toy = Callable[[str], None]


def install(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Toy:
    """Makes a folder's `toy_op` the only op, with a cache beside it; gives what replaces its kernels."""
    package = folder / "modules" / "toy_op"
    package.mkdir(parents=True)
    (package / "__init__.py").write_text("")
    monkeypatch.syspath_prepend(str(package.parent))
    monkeypatch.setenv("PYTHONPATH", str(package.parent), prepend=os.pathsep)
    monkeypatch.setenv("NEMO_EXPORT_CACHE", str(folder / "cache"))
    monkeypatch.setattr(building, "ops", lambda: [SimpleNamespace(torch_name="toy_op", package="toy_op")])

    def write(source: str) -> None:
        (package / "kernels.py").write_text(source)

    write(TOY)
    return write


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> SimpleNamespace:
    """The index of the toy kernels in FP16 for all SMs, and the folder whose `cache` holds them."""
    folder = tmp_path_factory.mktemp("built")
    with pytest.MonkeyPatch.context() as monkeypatch:
        install(folder, monkeypatch)
        return SimpleNamespace(folder=folder, index=build(folder / "out", dtypes=("fp16",)))


@pytest.fixture
def toy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Toy:
    """The toy op with an empty cache."""
    return install(tmp_path, monkeypatch)


@pytest.fixture
def cached_toy(toy: Toy, built: SimpleNamespace, tmp_path: Path) -> Toy:
    """The toy op with a cache that holds its kernels in FP16."""
    shutil.copytree(built.folder / "cache", tmp_path / "cache")
    return toy


@pytest.fixture
def compiled(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The titles of what workers were asked, as they are asked."""
    titles: list[str] = []
    ask = Workers.ask

    def recorded(self: Workers, requests: dict[str, Any]) -> Any:
        titles.extend(requests)
        return ask(self, requests)

    monkeypatch.setattr(Workers, "ask", recorded)
    return titles


def sections(cubin: bytes) -> dict[str, bytes]:
    """An ELF file's sections by name."""
    (offset,) = struct.unpack_from("<Q", cubin, 40)
    size, count, names_index = struct.unpack_from("<3H", cubin, 58)
    headers = [struct.unpack_from("<IIQQQQ", cubin, offset + i * size) for i in range(count)]
    start = headers[names_index][4]
    names = [cubin[start + h[0] : cubin.index(b"\0", start + h[0])].decode() for h in headers]
    return {name: cubin[h[4] : h[4] + h[5]] for name, h in zip(names, headers, strict=True)}


def register_count(info: bytes) -> int:
    """The registers of the one function that a `.nv.info` section tells of."""
    return next(value for kind, value in attributes(info) if kind == 0x2F)


def attributes(info: bytes) -> Iterator[tuple[int, int]]:
    """Attributes of a function: the kind, and the 32-bit value that follows the function's symbol."""
    at = 0
    while at < len(info):
        form, kind, size = struct.unpack_from("<BBH", info, at)
        at += 4
        if form == 4:
            if size == 8:
                yield kind, struct.unpack_from("<4xI", info, at)[0]
            at += size


def find(index: KernelIndex, sm: int, variant: str) -> Kernel:
    (kernel,) = (k for k in index.kernels if (k.op, k.sm, k.variant.name) == ("toy_op", sm, variant))
    return kernel


FP16 = "scale_fp16_BLOCK256_w4_s1"
PRODUCT = "product_fp16_fp32_SIZE64_w4_s2"


def test_a_cubin_and_what_its_launch_needs(built: SimpleNamespace) -> None:
    index = built.index
    assert [(kernel.sm, kernel.variant.name) for kernel in index.kernels] == [
        (sm, variant) for sm in SMS for variant in (PRODUCT, FP16)
    ]
    kernel = find(index, 90, FP16)
    assert kernel.file == f"sm90/toy_op/{FP16}.cubin"
    signature = {"x": "*fp16", "factor": "fp32", "N": "i32", "y": "*fp16"}
    assert kernel.variant == Variant("scale", signature, {"BLOCK": 256}, 4, 1, ("x", "y", "N"))
    assert kernel.hidden_pointers == 2
    assert (kernel.target, kernel.shared, kernel.spill_stores, kernel.stack) == ("sm_90a", 0, 0, 0)
    assert find(index, 90, PRODUCT).shared >= 64 * 64 * 2


@pytest.mark.parametrize("sm", SMS)
def test_the_entry_agrees_with_the_cubin_itself(built: SimpleNamespace, sm: int) -> None:
    index = built.index
    for variant in (FP16, PRODUCT):
        kernel = find(index, sm, variant)
        cubin = index.cubin(kernel)
        (flags,) = struct.unpack_from("<I", cubin, 48)
        assert sm in (flags & 0xFF, flags >> 8 & 0xFF)
        found = sections(cubin)
        assert register_count(found[".nv.info"]) == kernel.registers
        # Constant bank 0 ends with the parameters: 8 bytes a pointer, 4 a scalar.
        parameters = sum(8 if kind.startswith("*") else 4 for kind in kernel.variant.signature.values())
        assert len(found[f".nv.constant0.{kernel.entry}"]) >= parameters + 8 * kernel.hidden_pointers


def test_nothing_changed_costs_nothing(
    cached_toy: Toy, built: SimpleNamespace, tmp_path: Path, compiled: list[str]
) -> None:
    again = build(tmp_path / "again", dtypes=("fp16",))
    assert again.kernels == built.index.kernels
    assert compiled == []


def test_the_second_build_imports_neither_triton_nor_torch(tmp_path: Path) -> None:
    command = [
        *(sys.executable, "-X", "importtime", make_plugin_library.__file__),
        *("--sm", "90", "--dtype", "fp16", "--op", "causal_conv1d", "--no-link", "--verbose"),
    ]
    environment = os.environ | {"NEMO_EXPORT_CACHE": str(tmp_path / "cache"), "TRITON_INTERPRET": "1"}
    runs = []
    for _ in range(2):
        started = time.perf_counter()
        result = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
        runs.append((time.perf_counter() - started, result))
    assert not re.search(r"\b(triton|torch)\b", runs[1][1].stderr)
    assert runs[1][0] < 2
    assert "conv_" in runs[1][1].stdout
    assert runs[1][1].stdout == runs[0][1].stdout


def test_a_change_recompiles_what_it_touches(cached_toy: Toy, tmp_path: Path, compiled: list[str]) -> None:
    cached_toy(TOY.replace("tl.dot(tl.load(a + index)", "tl.dot(2 * tl.load(a + index)"))
    build(tmp_path / "out", (90,), ("fp16",))
    assert compiled == ["toy_op, its variants", f"toy_op, SM 90, {PRODUCT}"]


def test_the_same_source_gives_the_same_bytes(toy: Toy, built: SimpleNamespace, tmp_path: Path) -> None:
    index = build(tmp_path / "out", (90,), ("fp16",), jobs=1)
    first = built.index
    assert index.kernels == tuple(kernel for kernel in first.kernels if kernel.sm == 90)
    assert all(str(tmp_path).encode() not in index.cubin(kernel) for kernel in index.kernels)


def test_a_damaged_cache_entry_is_compiled_again(
    cached_toy: Toy, built: SimpleNamespace, tmp_path: Path, compiled: list[str]
) -> None:
    kernel = find(built.index, 90, FP16)
    for path in cache_folder().rglob("*.cubin"):
        if path.read_bytes() == (built.index.folder / kernel.file).read_bytes():
            path.write_bytes(path.read_bytes()[:-1] + b"\xff")
    index = build(tmp_path / "out", (90,), ("fp16",))
    assert compiled == [f"toy_op, SM 90, {FP16}"]
    assert find(index, 90, FP16) == kernel
    assert index.cubin(kernel)


def test_the_ptx_is_that_of_the_cubin_and_is_not_shipped(
    cached_toy: Toy, built: SimpleNamespace, compiled: list[str]
) -> None:
    keys = [("toy_op", sm, FP16) for sm in (80, 90)]
    kernels = kernels_with_ptx(keys)
    assert compiled == []
    for (_, sm, name), (kernel, ptx) in kernels.items():
        assert kernel == find(built.index, sm, name)
        assert f".target {kernel.target}" in ptx
        assert f".entry {kernel.entry}(" in ptx
    assert {path.suffix for path in built.index.folder.rglob("*") if path.is_file()} == {".cubin"}
    with pytest.raises(KernelError, match="there is no variant scale of toy_op for SM 80"):
        kernels_with_ptx([("toy_op", 80, "scale")])


class TestFailures:
    def failure(self, tmp_path: Path, sm: int = 90, dtype: str = "fp16") -> str:
        with pytest.raises(KernelError) as caught:
            build(tmp_path / "out", (sm,), (dtype,))
        assert not (tmp_path / "out").exists()
        assert "\n" not in str(caught.value)
        return str(caught.value)

    def test_a_kernel_that_does_not_compile(self, toy: Toy, tmp_path: Path) -> None:
        toy(TOY.replace("* factor", "* factors"))
        assert self.failure(tmp_path) == (
            f"toy_op, SM 90, {FP16}: CompilationError: NameError('factors is not defined')"
        )

    def test_a_compiler_that_aborts(self, toy: Toy, tmp_path: Path) -> None:
        toy(TOY + "\nimport os, sys\nfrom triton.backends.nvidia.compiler import CUDABackend\n"
            "def abort(*_):\n    sys.stderr.write('LLVM ERROR: Cannot select: 0x5 = fma\\n')\n"
            "    sys.stderr.flush()\n    os.abort()\nCUDABackend.make_ptx = abort\n")  # fmt: skip
        assert "product" in (text := self.failure(tmp_path)) or "scale" in text
        assert "toy_op, SM 90, " in text
        assert "the compiler ended with status -6 (LLVM ERROR: Cannot select: 0x5 = fma)" in text

    def test_parameters_that_are_not_the_kernels(self, toy: Toy, tmp_path: Path) -> None:
        toy(TOY.replace('"factor": "fp32", "N": "i32"', '"N": "i32", "factor": "fp32"'))
        assert f"toy_op, SM 90, {FP16}: the signature and constants are" in self.failure(tmp_path)

    def test_a_parameter_that_cannot_be_passed(self, toy: Toy, tmp_path: Path) -> None:
        toy(TOY.replace('"factor": "fp32"', '"factor": "fp64"'))
        assert "parameter factor has type fp64; it must be a pointer or one of i32" in self.failure(tmp_path)

    def test_more_shared_memory_than_the_sm_has(self, toy: Toy, tmp_path: Path) -> None:
        toy(
            TOY.replace('("fp16", "fp8e4nv") if', '("fp32",) if')
            .replace('"SIZE": 64', '"SIZE": 128')
            .replace("4, 2", "8, 2")
        )
        text = self.failure(tmp_path, sm=89, dtype="fp32")
        assert "toy_op, SM 89, product_fp32_SIZE128_w8_s2: 131072 bytes of shared memory" in text
        assert "but a block on SM 89 has 101376" in text

    def test_fp8_rounded_twice(self, toy: Toy, tmp_path: Path) -> None:
        """Triton's own conversion, on the SM where it goes through FP16."""
        toy(TOY.replace(").to(y.dtype.element_ty)", ").to(tl.float8e4nv).to(y.dtype.element_ty)"))
        assert self.failure(tmp_path, sm=89, dtype="fp32").startswith(
            "toy_op, SM 89, scale_fp32_BLOCK256_w4_s1: the PTX contains cvt.rz.f16.f32: FP32 is converted to FP8"
        )

    def test_names_that_are_not_unique(self, toy: Toy, tmp_path: Path) -> None:
        toy(TOY.replace('("fp32", "fp16", "bf16")', '("fp16", "fp16")'))
        assert f"2 variants on SM 90 are named {FP16}" in self.failure(tmp_path)

    def test_fp8_listed_where_there_is_none(self, toy: Toy, tmp_path: Path) -> None:
        toy(TOY.replace("if supports_fp8(sm)", "if True"))
        assert "SM 80 has no FP8 tensor cores" in self.failure(tmp_path, sm=80)

    def test_a_module_that_does_not_import(self, toy: Toy, tmp_path: Path) -> None:
        toy("import no_such_module")
        assert self.failure(tmp_path) == (
            "toy_op, its variants: ModuleNotFoundError: No module named 'no_such_module'"
        )

    def test_no_triton(self, toy: Toy, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        def missing(name: str) -> str:
            raise importlib.metadata.PackageNotFoundError(name)

        monkeypatch.setattr(importlib.metadata, "version", missing)
        assert "pip install 'nemo-export[kernels]'" in self.failure(tmp_path)


def kernel(variant: str, spilled: int) -> Kernel:
    return Kernel(
        op="op",
        sm=90,
        variant=Variant("kernel", {}, {"NAME": variant}, 4, 1),
        file="kernel.cubin",
        sha256="0" * 64,
        num_bytes=1,
        entry="kernel",
        target="sm_90a",
        hidden_pointers=2,
        shared=0,
        registers=255,
        stack=spilled,
        spill_stores=spilled,
        spill_loads=spilled,
    )


class TestCommand:
    def test_it_prints_what_kernels_use(self, cached_toy: Toy) -> None:
        arguments = ["--sm", "89,90", "--dtype", "fp16", "--no-link", "--verbose"]
        result = CliRunner().invoke(make_plugin_library.main, arguments)
        assert result.exit_code == 0, result.output
        for name in ("registers", "shared B", "spilled B", FP16, PRODUCT):
            assert name in result.output
        assert "4 kernels" in result.output

    def test_an_error_is_one_line(self, toy: Toy) -> None:
        result = CliRunner().invoke(make_plugin_library.main, ["--sm", "8.9", "--no-link"])
        assert result.exit_code == 1
        assert result.output == (
            "Error: there are no kernels for SM 8.9: choose from 80, 86, 89, 90, 100, 120\n"
        )

    def test_spills_are_shown_without_asking(self) -> None:
        from rich.console import Console

        kernels = [kernel("tidy_variant", spilled=0), kernel("spilling_variant", spilled=40)]
        console = Console(width=120)
        with console.capture() as captured:
            console.print(make_plugin_library.resource_table(kernels, every_variant=False))
        assert "spilling_variant" in captured.get()
        assert "tidy_variant" not in captured.get()
