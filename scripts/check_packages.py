#!/usr/bin/env python3
"""Builds the source distribution and the wheel, and tests the wheel in an environment without the checkout.

The environment sees the packages that this one has, by a path, but not this one's own nemo-export: what is tried is
what the wheel holds, without downloading PyTorch again. Their versions are the installation's to settle.
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


@click.command()
@click.option("--output", type=click.Path(path_type=Path), default=ROOT / "dist", help="Where both go.")
def main(output: Path) -> None:
    """Build both packages, and leave them at the output when they hold everything and work."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        run(sys.executable, "-m", "build", "--no-isolation", "--outdir", folder / "dist", ROOT)
        (sdist,), (wheel,) = (folder / "dist").glob("*.tar.gz"), (folder / "dist").glob("*.whl")
        complete(sdist, wheel)
        tried(wheel, folder)
        output.mkdir(exist_ok=True)
        for package in (sdist, wheel):
            click.echo(shutil.copy2(package, output))


def run(*command: object, where: Path = ROOT) -> str:
    """What the command prints; its failure ends this script with what it said."""
    words = [str(word) for word in command]
    done = subprocess.run(words, cwd=where, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"{' '.join(words)} ended with {done.returncode}\n{done.stdout}{done.stderr}")
    return done.stdout


def complete(sdist: Path, wheel: Path) -> None:
    """Every file of the repository is in the one, every source of the packages in the other."""
    tracked = set(run("git", "ls-files").splitlines())
    with tarfile.open(sdist) as archive:
        held = {name.partition("/")[2] for name in archive.getnames()}
    if lacking := sorted(tracked - held):
        raise SystemExit(f"{sdist.name} lacks {', '.join(lacking)}: add them to MANIFEST.in")
    wanted = {f"nemotrt/{name}" for name in tracked if name.startswith(("exporter/", "model/", "plugins/"))}
    if lacking := sorted(wanted - set(zipfile.ZipFile(wheel).namelist())):
        raise SystemExit(
            f"{wheel.name} lacks {', '.join(lacking)}: add them to pyproject.toml's package-data"
        )


def tried(wheel: Path, folder: Path) -> None:
    """The wheel installs, and its program checks, builds and verifies the example."""
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


if __name__ == "__main__":
    main()
