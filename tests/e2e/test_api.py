"""The package as a library: the examples of docs/api.md run in order, and imports are lazy."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import nemotrt.exporter
from nemotrt.exporter import BuildConfig, GenerateConfig, Session, ValidationRequest
from nemotrt.exporter.errors import UsageError

ROOT = Path(__file__).resolve().parents[2]
EXAMPLES = re.findall(r"^```python\n(.*?)^```", (ROOT / "docs/api.md").read_text(), re.DOTALL | re.MULTILINE)

IMPORTS = """
import sys
before = set(sys.modules)
import nemotrt.exporter
assert dir(nemotrt.exporter)
names = {name.partition(".")[0] for name in set(sys.modules) - before} - sys.stdlib_module_names
assert names == {"nemotrt"}, names
"""

BLOCKED = """
import sys
sys.modules.update(dict.fromkeys(("torch", "polygraphy")))
from nemotrt.exporter.cli import program
program(sys.argv[1:], prog_name="nemo-export")
"""


def run(code: str, *arguments: object, folder: Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", code, *map(str, arguments)]
    return subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False, timeout=300)


@pytest.mark.slow
def test_the_examples_run_in_order(tmp_path: Path) -> None:
    assert len(EXAMPLES) == 4
    shutil.copytree(ROOT / "examples", tmp_path / "examples")
    for example in EXAMPLES:
        result = run(example, folder=tmp_path)
        assert result.returncode == 0, result.stderr
        assert result.stdout
        assert not result.stderr


def test_the_package_imports_nothing_heavy(tmp_path: Path) -> None:
    result = run(IMPORTS, folder=tmp_path)
    assert result.returncode == 0, result.stderr


@pytest.mark.parametrize("name", nemotrt.exporter.__all__)
def test_every_public_name_can_be_imported(name: str) -> None:
    assert getattr(nemotrt.exporter, name)


def test_an_unknown_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="has no attribute 'nonsense'"):
        _ = nemotrt.exporter.nonsense


def test_a_path_may_be_a_string(bundle: Path, tmp_path: Path) -> None:
    events = nemotrt.exporter.generate(str(bundle), ["for"], GenerateConfig(max_new_tokens=1))
    assert len(list(events)) == 1
    graph = bundle / "model.onnx"
    by_name, by_path = (Session(path, num_slots=2, num_pages=2) for path in (str(graph), graph))
    assert by_name.pools == by_path.pools
    config = BuildConfig("checkpoint", "out", calibration="text")  # type: ignore[arg-type]
    assert (config.checkpoint, config.output, config.calibration) == (
        Path("checkpoint"),
        Path("out"),
        Path("text"),
    )
    assert ValidationRequest("bundle", base="base") == ValidationRequest(Path("bundle"), base=Path("base"))  # type: ignore[arg-type]
    with pytest.raises(UsageError, match="nowhere is not a folder"):
        nemotrt.exporter.quantize("checkpoint", str(tmp_path / "nowhere" / "fp8"))


def test_a_prompt_in_place_of_a_list_is_refused(bundle: Path) -> None:
    with pytest.raises(UsageError, match="one string, not a list"):
        next(nemotrt.exporter.generate(bundle, "for", GenerateConfig()))


@pytest.mark.parametrize(
    "arguments",
    [
        ("check", "{checkpoint}"),
        ("inspect", "{checkpoint}"),
        ("inspect", "{bundle}"),
        ("verify", "{bundle}"),
        ("generate", "{bundle}", "--prompt", "for", "--max-new-tokens", "2"),
        ("validate", "{bundle}", "--golden", "{golden}"),
    ],
    ids=" ".join,
)
def test_running_a_bundle_needs_no_package_of_the_extra_build(
    bundle: Path, golden: Path, tmp_path: Path, arguments: tuple[str, ...]
) -> None:
    places = {"bundle": bundle, "checkpoint": bundle.parent / "checkpoint", "golden": golden}
    result = run(BLOCKED, *(argument.format(**places) for argument in arguments), folder=tmp_path)
    assert result.returncode == 0, result.stderr


@pytest.mark.parametrize("command", ["build", "quantize"])
def test_a_command_that_lacks_the_extra_build_names_it_before_it_reads_weights(
    bundle: Path, tmp_path: Path, command: str
) -> None:
    checkpoint = bundle.parent / "checkpoint"
    result = run(BLOCKED, command, checkpoint, "--output", tmp_path / "out", folder=tmp_path)
    assert result.returncode == 2
    *stages, error, hint = result.stderr.splitlines()
    assert error == f"error: nemo-export {command} needs torch, which is not installed"
    assert hint == "  pip install 'nemo-export[build]'"
    assert not [line for line in stages if line.startswith("zeros")]
    assert not list(tmp_path.iterdir())
