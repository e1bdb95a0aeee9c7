"""What the tests of the command line share."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import bad_checkpoints
import pytest
from click.testing import CliRunner
from forks import Zygote

from nemotrt.exporter.cli import program


@pytest.fixture(scope="session")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A bundle with a tokenizer, not proved, beside its `checkpoint`; neither is to be written to."""
    folder = tmp_path_factory.mktemp("bundles")
    bad_checkpoints.write(bad_checkpoints.GOOD_WITH_TOKENIZER, folder / "checkpoint")
    options = ("--runtime", "onnx", "--no-validate", "--max-context", "64")
    made = CliRunner().invoke(
        program, ["build", str(folder / "checkpoint"), *options, "-o", str(folder / "bundle")]
    )
    assert made.exit_code == 0, made.stderr
    return folder / "bundle"


@pytest.fixture(scope="session")
def golden(bundle: Path) -> Path:
    """What PyTorch showed of that bundle, beside it; not to be written to."""
    path = bundle.parent / "model.golden"
    checkpoint = str(bundle.parent / "checkpoint")
    options = ["--checkpoint", checkpoint, "--drift-steps", "0", "--save-golden", str(path)]
    made = CliRunner().invoke(program, ["validate", str(bundle), *options])
    assert made.exit_code == 0, made.output
    return path


@pytest.fixture(scope="session")
def zygote() -> Iterator[Zygote]:
    """A process with all imports behind it, in whose forks commands run."""
    started = Zygote()
    yield started
    started.close()


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Relative paths are below the test's own folder: whatever is written by mistake is seen there."""
    monkeypatch.chdir(tmp_path)
