"""Ctrl-C and SIGKILL in every stage: never a bundle that is not whole, and the same command goes on from there."""

from __future__ import annotations

import hashlib
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from checkpoints import write_checkpoint
from forks import PATIENCE, Child, Zygote

KEPT_AFTER = {
    "load": (),
    "zeros": (),
    "trace": ("zeros",),
    "lower": ("zeros",),
    "validate": ("zeros", "lower"),
    "bundle": ("zeros", "lower", "validate"),
}
"""A stage that is interrupted → the stages that the next build does not run again."""

ATTEMPTS = 30


@pytest.fixture(scope="module")
def subject(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint of one layer that has state, and weights that take a moment to write."""
    folder = tmp_path_factory.mktemp("subject") / "checkpoint"
    return write_checkpoint(folder, hybrid_override_pattern="*", vocab_size=12_000)


def held_in(stage: str, zygote: Zygote, command: tuple[object, ...], stderr: Path) -> Child:
    """The command, stopped in the middle of the stage: its beginning was said, and its end was not.

    Stopping comes too late where a stage takes less than a millisecond or two; then the command is run again.
    """
    for _ in range(ATTEMPTS):
        stderr.unlink(missing_ok=True)
        child = zygote.run(*command, stderr=stderr)
        give_up = time.monotonic() + PATIENCE
        while not any(line.startswith(f"{stage:<9} ") for line in child.said()):
            assert time.monotonic() < give_up, child.said()
            time.sleep(0.0005)
        child.stop()
        lines = [line for line in child.said() if line.startswith(f"{stage:<9} ")]
        if len(lines) == 1 and lines[0].endswith("…"):
            return child
        child.send(signal.SIGKILL)
        child.wait()
    raise AssertionError(f"{ATTEMPTS} times too late for {stage}")


def hashes(folder: Path) -> dict[str, str]:
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in folder.iterdir()}


@pytest.mark.parametrize("stage", KEPT_AFTER)
@pytest.mark.parametrize("name", ["SIGINT", "SIGKILL"])
def test_a_stopped_build(zygote: Zygote, subject: Path, tmp_path: Path, name: str, stage: str) -> None:
    """No output, checkpoint unchanged. The same command continues after the last completed stage."""
    number = signal.Signals[name]
    place = tmp_path / "here"
    place.mkdir()
    # What comes after the stage is not needed, and comparing takes the most time.
    early = () if stage in ("validate", "bundle") else ("--no-validate",)
    command = ("build", "-v", subject, "--output", place / "out", "--runtime", "onnx", *early)
    before = hashes(subject)

    child = held_in(stage, zygote, command, tmp_path / "stderr")
    sent = time.monotonic()
    child.send(number)
    code = child.wait()
    took = time.monotonic() - sent
    assert not (place / "out").exists()
    said = child.said()
    if number == signal.SIGINT:
        assert code == 130, said
        assert said[-1] == "interrupted"
        assert not any("Traceback" in line for line in said)
        assert took < 3  # within a second, where nothing else keeps the machine busy
        assert os.listdir(place) == ([".out.building"] if KEPT_AFTER[stage] else [])
    else:
        assert code == -signal.SIGKILL

    again = zygote.run(*command, stderr=tmp_path / "stderr")
    assert again.wait() == 0, again.said()
    kept = tuple(
        line.split()[0] for line in again.said() if line.endswith("is reused from the previous build")
    )
    assert kept == KEPT_AFTER[stage]
    assert os.listdir(place) == ["out"]
    verified = zygote.run("verify", place / "out", stderr=tmp_path / "stderr")
    assert verified.wait() == 0, verified.said()
    assert hashes(subject) == before


def test_a_resumed_build_equals_an_uninterrupted_one(zygote: Zygote, subject: Path, tmp_path: Path) -> None:
    """The manifest, and so every file, is identical."""

    def manifest(output: Path) -> bytes:
        return (output / "manifest.json").read_bytes()

    options = ("--runtime", "onnx", "--no-validate", "-v")
    straight = zygote.run("build", subject, "-o", tmp_path / "straight", *options, stderr=tmp_path / "stderr")
    assert straight.wait() == 0
    command = ("build", subject, "-o", tmp_path / "resumed", *options)
    child = held_in("bundle", zygote, command, tmp_path / "stderr")
    child.send(signal.SIGKILL)
    child.wait()
    again = zygote.run(*command, stderr=tmp_path / "stderr")
    assert again.wait() == 0
    assert any("reused from the previous build" in line for line in again.said())
    assert manifest(tmp_path / "resumed") == manifest(tmp_path / "straight")


PROGRAM = """
import sys
from nemotrt.exporter import interrupts
from nemotrt.exporter.cli import main
interrupts.GRACE = 60  # on a busy machine PyTorch's libraries take longer to load than the process may
sys.exit(main())
"""


@pytest.mark.parametrize("name", ["SIGINT", "SIGTERM", "SIGHUP"])
def test_an_interrupted_process(subject: Path, tmp_path: Path, name: str) -> None:
    """Exit 130, 143 or 129, `interrupted`, no traceback, no files left."""
    number = signal.Signals[name]
    options = ["-v", "build", subject, "--output", tmp_path / "out", "--runtime", "onnx"]
    command = [sys.executable, "-c", PROGRAM, *options]
    process = subprocess.Popen(
        # The tests may run under nohup.
        command,
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=lambda: signal.signal(number, signal.SIG_DFL),
    )
    assert process.stderr
    lines = [process.stderr.readline(), process.stderr.readline()]  # load begins, load ends
    process.send_signal(number)
    rest = process.communicate(timeout=PATIENCE)[1]
    assert process.returncode == 128 + number, lines
    assert rest.splitlines()[-1] == "interrupted"
    assert "Traceback" not in rest
    assert os.listdir(tmp_path) == []


NATIVE = """
import hashlib
from nemotrt.exporter import interrupts
with interrupts.handled():
    print("begins", flush=True)
    hashlib.pbkdf2_hmac("sha256", b"", b"", 2_000_000_000)  # minutes that Python cannot leave
"""


@pytest.mark.parametrize("name", ["SIGINT", "SIGTERM", "SIGHUP"])
def test_a_native_call_that_does_not_return(name: str) -> None:
    """The process ends within a second."""
    number = signal.Signals[name]
    process = subprocess.Popen(
        [sys.executable, "-c", NATIVE],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=lambda: signal.signal(number, signal.SIG_DFL),
    )
    try:
        assert process.stdout
        assert process.stdout.readline() == "begins\n"
        time.sleep(0.5)  # from the print to the call: a signal between the two is Python's own to answer
        process.send_signal(number)
        assert process.communicate(timeout=PATIENCE)[1] == "interrupted\n"
        assert process.returncode == 128 + number
    finally:
        process.kill()


HANGUP = """
import os, signal
from nemotrt.exporter import interrupts
with interrupts.handled():
    os.kill(os.getpid(), signal.SIGHUP)
"""


def test_a_hangup_that_nohup_ignores() -> None:
    """The command goes on."""
    assert (
        subprocess.run(["nohup", sys.executable, "-c", HANGUP], capture_output=True, check=False).returncode
        == 0
    )
