#!/usr/bin/env python3
"""Builds the source distribution and the wheel, and tests the wheel in two environments without the checkout.

The first shares this one's installed packages through a path file, so that PyTorch is not downloaded again, but not its
nemo-export. The second has what pip installs for running bundles, without PyTorch.
"""

from __future__ import annotations

import shutil
import subprocess
import sys
import tarfile
import tempfile
import venv
import zipfile
from pathlib import Path

import click

ROOT = Path(__file__).resolve().parents[1]
EXAMPLE = ROOT / "examples" / "tiny"
NOT_INSTALLED = "plugins/emulator/"
"""The source files that only tests of a checkout use."""
MAX_RUNNING_BYTES = 450_000_000
"""The most that an installation which only runs bundles may take."""


@click.command()
@click.option(
    "--output", type=click.Path(path_type=Path), default=ROOT / "dist", help="Folder for both packages."
)
def main(output: Path) -> None:
    """Build both packages, and copy them to the output folder if they are complete and work."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        run(sys.executable, "-m", "build", "--no-isolation", "--outdir", folder / "dist", ROOT)
        (sdist,), (wheel,) = (folder / "dist").glob("*.tar.gz"), (folder / "dist").glob("*.whl")
        check_contents(sdist, wheel)
        test_wheel(wheel, folder)
        test_running_alone(wheel, folder)
        output.mkdir(exist_ok=True)
        for package in (sdist, wheel):
            click.echo(shutil.copy2(package, output))


def run(*command: object, where: Path = ROOT) -> str:
    """The command's stdout; exits with its output if it fails."""
    words = [str(word) for word in command]
    result = subprocess.run(words, cwd=where, capture_output=True, text=True, check=False)
    if result.returncode:
        raise SystemExit(f"{' '.join(words)} ended with {result.returncode}\n{result.stdout}{result.stderr}")
    return result.stdout


def check_contents(sdist: Path, wheel: Path) -> None:
    """Check that the source distribution has every tracked file, and the wheel every source file."""
    tracked = set(run("git", "ls-files").splitlines())
    with tarfile.open(sdist) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    if missing := sorted(tracked - names):
        raise SystemExit(f"{sdist.name} lacks {', '.join(missing)}: add them to MANIFEST.in")
    shipped = [name for name in tracked if name.startswith(("exporter/", "model/", "plugins/"))]
    sources = {f"nemotrt/{name}" for name in shipped if not name.startswith(NOT_INSTALLED)}
    if missing := sorted(sources - set(zipfile.ZipFile(wheel).namelist())):
        raise SystemExit(
            f"{wheel.name} lacks {', '.join(missing)}: add them to pyproject.toml's package-data"
        )


def test_wheel(wheel: Path, folder: Path) -> None:
    """Install the wheel; check, build and verify the example with it."""
    home = folder / "venv"
    venv.create(home, with_pip=False)
    python = home / "bin" / "python"
    run(sys.executable, "-m", "pip", "--python", python, "install", "--quiet", "--no-deps", wheel)
    site = run(python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))").strip()
    shared = [path for path in sys.path if path.endswith("site-packages")]
    (Path(site) / "shared.pth").write_text("".join(f"{path}\n" for path in shared))
    found = run(python, "-c", "import nemotrt.exporter; print(*nemotrt.exporter.__path__)", where=folder)
    if not found.startswith(site):
        raise SystemExit(f"what was tried is {found.strip()}, not the wheel's in {site}")
    program, bundle = home / "bin" / "nemo-export", folder / "bundle"
    click.echo(run(program, "--version", where=folder).strip())
    run(program, "check", EXAMPLE, where=folder)
    run(program, "build", EXAMPLE, "--output", bundle, "--runtime", "onnx", where=folder)
    click.echo(run(program, "verify", bundle, where=folder).strip())
    golden = ("--checkpoint", EXAMPLE, "--drift-steps", "0", "--save-golden", folder / "golden")
    run(program, "validate", bundle, *golden, where=folder)


def test_running_alone(wheel: Path, folder: Path) -> None:
    """Install the wheel with the extra `cpu` alone, and run the bundle of `test_wheel` with it."""
    home, bundle = folder / "running", folder / "bundle"
    venv.create(home, with_pip=False)
    python, program = home / "bin" / "python", home / "bin" / "nemo-export"
    run(sys.executable, "-m", "pip", "--python", python, "install", "--quiet", f"{wheel}[cpu]")
    size = sum(path.lstat().st_size for path in home.rglob("*"))
    click.echo(f"the extra cpu alone takes {size / 1e9:.2f} GB")
    if size > MAX_RUNNING_BYTES:
        raise SystemExit(
            f"more than {MAX_RUNNING_BYTES / 1e9:.2f} GB: what was added to the base dependencies?"
        )
    run(program, "check", EXAMPLE, where=folder)
    run(program, "inspect", bundle, where=folder)
    run(program, "verify", bundle, where=folder)
    run(program, "generate", bundle, "--prompt", "The", "--max-new-tokens", "4", where=folder)
    run(program, "validate", bundle, "--golden", folder / "golden", where=folder)


if __name__ == "__main__":
    main()
