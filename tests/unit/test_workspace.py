"""The folder that a build works in: nothing half done is ever seen, and nothing of the user's is lost."""

from __future__ import annotations

import fcntl
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import IO, Any

import pytest
from crash_workspace import Stage, build, seen

from nemotrt.exporter import workspace as module
from nemotrt.exporter.errors import UsageError
from nemotrt.exporter.workspace import JOURNAL, Workspace, digest

KEY = "inputs"


@pytest.fixture
def output(tmp_path: Path) -> Path:
    return tmp_path / "out"


def first_stage(output: Path, content: str = "graph") -> Path:
    """A build that was stopped after its first stage; returns its root."""
    with Workspace.open(output, force=True) as workspace:
        (workspace.folder / "graph").write_text(content)
        workspace.record("first", KEY, Stage(content))
        return workspace.root


def test_kills_at_every_file_operation(tmp_path: Path) -> None:
    script = Path(__file__).with_name("crash_workspace.py")
    found = subprocess.run(
        [sys.executable, script, tmp_path], capture_output=True, text=True, check=False, timeout=120
    )
    assert found.returncode == 0, found.stderr
    lines = [line.split() for line in found.stdout.splitlines()]
    at_once = [line[1] for line in lines]
    # Between two renames there is nothing for a moment; before it the old bundle, after it the new one.
    assert at_once.count("nothing") == 1
    gap = at_once.index("nothing")
    assert set(at_once[:gap]) == {"old"}
    assert set(at_once[gap + 1 :]) == {"new"}
    assert lines[gap][2] == "old"  # put back
    assert "kept" in {line[3] for line in lines}  # later kills lose no ended stage


def test_an_ended_stage_is_kept_for_the_same_inputs(output: Path) -> None:
    first_stage(output)
    with Workspace.open(output, force=False) as workspace:
        entry = workspace.finished("first", KEY)
        assert entry
        assert entry.decode(Stage) == Stage("graph")
        assert (workspace.folder / "graph").read_text() == "graph"


def test_a_stage_with_other_inputs_is_run_again_from_nothing(output: Path) -> None:
    first_stage(output)
    with Workspace.open(output, force=False) as workspace:
        assert workspace.finished("first", "other inputs") is None
        assert list(workspace.folder.iterdir()) == []
    # What was begun with other inputs must not be taken for what was recorded before.
    with Workspace.open(output, force=False) as workspace:
        assert workspace.finished("first", KEY) is None


def test_later_stages_are_forgotten_with_an_earlier_one(output: Path) -> None:
    first_stage(output)
    with Workspace.open(output, force=False) as workspace:
        workspace.record("second", KEY, Stage("engine"))
        assert workspace.finished("second", KEY)
        assert workspace.finished("first", "other inputs") is None
        assert workspace.finished("second", KEY) is None


@pytest.mark.parametrize("damage", ["removed", "truncated", "rewritten"])
def test_a_stage_whose_file_is_not_as_it_was_is_run_again(output: Path, damage: str) -> None:
    graph = first_stage(output) / "bundle" / "graph"
    if damage == "removed":
        graph.unlink()
    elif damage == "truncated":
        os.truncate(graph, 2)
    else:
        graph.write_text("hparg")
    with Workspace.open(output, force=False) as workspace:
        assert workspace.finished("first", KEY) is None


@pytest.mark.parametrize("text", ["", "{", "[]", "{}", json.dumps({"version": 0, "stages": {"first": 1}})])
def test_a_journal_that_means_nothing_is_not_continued(output: Path, text: str) -> None:
    root = first_stage(output)
    (root / JOURNAL).write_text(text)
    with Workspace.open(output, force=False) as workspace:
        assert not workspace.has_results
        assert list(workspace.folder.iterdir()) == []


def test_nothing_is_left_when_nothing_ended(output: Path) -> None:
    def interrupted() -> None:
        with Workspace.open(output, force=False) as workspace:
            (workspace.folder / "graph").write_text("half")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert os.listdir(output.parent) == []


def test_nothing_is_left_after_clear(output: Path) -> None:
    first_stage(output)
    with Workspace.open(output, force=False) as workspace:
        workspace.clear()
    assert os.listdir(output.parent) == []


def test_one_build_at_a_time(output: Path) -> None:
    with Workspace.open(output, force=False) as first:
        (first.folder / "graph").write_text("first's")
        with pytest.raises(UsageError, match="another build is writing"), Workspace.open(output, force=False):
            pass
        assert (first.folder / "graph").read_text() == "first's"


def test_a_lock_that_its_holder_removes_is_no_lock(output: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Opened, then removed by the build before, then locked: the lock would be on a file that nobody else sees."""
    locked: list[IO[str]] = []
    flock = fcntl.flock

    def late(file: IO[str], operation: int) -> None:
        if not locked:
            os.unlink(file.name)
        locked.append(file)
        flock(file, operation)

    monkeypatch.setattr(module.fcntl, "flock", late)
    with Workspace.open(output, force=False):
        assert len(locked) == 2
        monkeypatch.setattr(module.fcntl, "flock", flock)
        with pytest.raises(UsageError, match="another build is writing"), Workspace.open(output, force=False):
            pass


def test_a_failed_rename_puts_the_old_bundle_back(output: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    build(output, "old")
    rename = Path.rename

    def refuse(self: Path, target: Path) -> Any:
        if self.name == "bundle":
            raise OSError(28, "No space left on device")
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", refuse)
    with pytest.raises(OSError, match="No space left"):
        build(output, "new")
    assert seen(output) == "old"
    monkeypatch.undo()
    assert build(output, "new")  # from what the failed build had ended
    assert seen(output) == "new"
    assert os.listdir(output.parent) == ["out"]


@pytest.mark.parametrize("spelling", ["out", "./out", "out/", "../{folder}/out", "link/out"])
def test_an_output_however_it_is_spelt(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, spelling: str
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "link").symlink_to(tmp_path)
    build(Path(spelling.format(folder=tmp_path.name)), "new")
    assert seen(tmp_path / "out") == "new"
    assert sorted(os.listdir(tmp_path)) == ["link", "out"]


def test_an_empty_current_folder_as_output(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    build(Path(), "new")
    assert os.listdir(tmp_path) == ["here"]
    assert seen(tmp_path / "here") == "new"


def test_a_digest_tells_inputs_apart() -> None:
    assert digest([1, {"a": 2}]) == digest([1, {"a": 2}])
    assert digest([1, {"a": 2}]) != digest([1, {"a": 3}])


def test_a_digest_is_the_same_in_every_process() -> None:
    """Of sets too, whose order Python draws anew in each: an FP8 checkpoint's recipe holds some."""
    program = (
        "from nemotrt.exporter.workspace import digest; print(digest({'a': frozenset(map(str, range(99)))}))"
    )
    found = {
        subprocess.run(
            [sys.executable, "-c", program],
            check=True,
            stdout=subprocess.PIPE,
            env=os.environ | {"PYTHONHASHSEED": seed},
        ).stdout
        for seed in "123"
    }
    assert len(found) == 1
