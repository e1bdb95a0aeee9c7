#!/usr/bin/env python3
"""Builds the wheel that contains the plugin library, so that its users need no compiler: `make wheel`.

Zig's Clang, installed by a package, compiles the library against the C library of 2012, for this machine's architecture
or another. The wheel's platform tag follows from the symbols that the library needs.
"""

from __future__ import annotations

import platform
import re
import shutil
import subprocess
import sys
import tempfile
from importlib.util import find_spec
from pathlib import Path

import click

from nemotrt.plugins import build, link
from nemotrt.plugins.kernel_index import KernelError, KernelIndex
from nemotrt.plugins.variant import SMS

ROOT = Path(__file__).resolve().parents[1]
SOURCES = ("exporter", "model", "plugins", "pyproject.toml", "README.md", "LICENSE")

ARCHITECTURES = {"x86_64": "Advanced Micro Devices X86-64", "aarch64": "AArch64"}
"""Architecture in a wheel's name → in readelf's output."""

GLIBC = "2.17"
"""The version of manylinux2014; every distribution that still has updates has it or a later one."""

SYSTEM = re.compile(r"(lib(c|m|dl|pthread|rt)|ld-linux-(x86-64|aarch64))\.so\.\d+")
"""Libraries that every glibc has."""

MAX_BYTES = 60_000_000


def compiler(architecture: str, folder: Path) -> Path:
    """The path of a script that runs Zig's C++ compiler for the architecture; raises KernelError without Zig."""
    if find_spec("ziglang") is None:
        raise KernelError("the compiler for wheels is missing: pip install --group wheel")
    path = folder / f"zig-{architecture}"
    target = f"{architecture}-linux-gnu.{GLIBC}"
    path.write_text(f'#!/bin/sh\nexec {sys.executable} -m ziglang c++ -target {target} "$@"\n')
    path.chmod(0o755)
    return path


def platform_tag(library: Path, architecture: str) -> str:
    """The manylinux tag for the system libraries that the library needs.

    Raises KernelError if it has another architecture, needs more than the C library, or is too large.
    """
    output = _readelf(library)
    if f"Machine: {ARCHITECTURES[architecture]}" not in re.sub(r" +", " ", output):
        raise KernelError(f"{library} is not for {architecture}")
    needed = re.findall(r"\(NEEDED\).*\[(.*)\]", output)
    if foreign := [name for name in needed if not SYSTEM.fullmatch(name)]:
        raise KernelError(f"{library} needs {', '.join(foreign)}: a machine without it could not load it")
    if unknown := set(re.findall(r"Name: (\w+?)_[\d.]+ ", output)) - {"GLIBC"}:
        raise KernelError(f"{library} needs versions of {', '.join(sorted(unknown))}")
    size = library.stat().st_size
    if size > MAX_BYTES:
        raise KernelError(f"{library} has {size / 1e6:.1f} MB, a wheel may have {MAX_BYTES / 1e6:.0f}")
    versions = [
        tuple(map(int, version.split("."))) for version in re.findall(r"Name: GLIBC_([\d.]+)", output)
    ]
    major, minor, *_ = max(versions, default=(2, 0))
    min_minor = int(GLIBC.partition(".")[2])  # no tag is older
    return f"manylinux_{major}_{max(minor, min_minor)}_{architecture}"


def _readelf(library: Path) -> str:
    if shutil.which("readelf") is None:
        raise KernelError("readelf is missing: install binutils")
    command = ["readelf", "--wide", "--file-header", "--dynamic", "--version-info", str(library)]
    result = subprocess.run(command, capture_output=True, text=True, check=False, env={"LC_ALL": "C"})
    if result.returncode:
        raise KernelError(f"{library} is not a library: {result.stderr.strip()}")
    return result.stdout


def wheel(library: Path, tag: str, output: Path) -> Path:
    """Build this checkout's wheel with the library in it; returns its path in the folder `output`."""
    with tempfile.TemporaryDirectory(prefix="nemo-wheel-") as temporary:
        tree = Path(temporary) / "tree"
        tree.mkdir()
        for name in SOURCES:
            copy = shutil.copytree if (ROOT / name).is_dir() else shutil.copy
            copy(ROOT / name, tree / name)
        prebuilt = tree / "plugins" / "prebuilt"
        prebuilt.mkdir()
        for name in (link.LIBRARY_NAME, link.DESCRIPTION_NAME):
            shutil.copy(library.parent / name, prebuilt)
        dist = Path(temporary) / "dist"
        command = [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", str(dist)]
        command += [f"-C--build-option=--plat-name={tag}", str(tree)]
        result = subprocess.run(command, capture_output=True, text=True, check=False)
        if result.returncode:
            raise KernelError(f"the wheel cannot be built: {result.stdout.strip()[-2000:]}")
        (path,) = dist.glob(f"*-{tag}.whl")
        output.mkdir(parents=True, exist_ok=True)
        return Path(shutil.move(path, output / path.name))


def make(architecture: str, kernels: KernelIndex, work: Path, output: Path) -> Path:
    """Link these kernels in `work` and build the wheel for the architecture; raises KernelError on failure."""
    with tempfile.TemporaryDirectory(prefix="nemo-compiler-") as folder:
        toolchain = link.Toolchain(str(compiler(architecture, Path(folder))))
        library = link.link(kernels, work, toolchain)
    return wheel(library, platform_tag(library, architecture), output)


@click.command()
@click.option("--arch", type=click.Choice(list(ARCHITECTURES)), default=platform.machine(), show_default=True)
@click.option("--sm", "sms", type=int, multiple=True, default=SMS, show_default=True, help="May be repeated.")
@click.option("--jobs", type=click.IntRange(min=1), default=None, help="Kernels compiled in parallel.")
@click.option(
    "--output", type=click.Path(path_type=Path), default=ROOT / "dist", help="Folder for the wheel."
)
def main(arch: str, sms: tuple[int, ...], jobs: int | None, output: Path) -> None:
    """Compile every kernel, link the plugin library, and put it into a wheel."""
    work = ROOT / "build" / "wheel"
    try:
        kernels = build.build(work / "kernels", sms, jobs=jobs or 0)
        path = make(arch, kernels, work / arch, output)
    except KernelError as error:
        raise click.ClickException(str(error)) from None
    print(f"{path}: {path.stat().st_size / 1e6:.1f} MB, {len(kernels.kernels)} kernels for SM {sms}")


if __name__ == "__main__":
    main()
