"""However the engine builder ends, the build goes on or says why; nothing of it outlives the build."""

from __future__ import annotations

import os
import signal
import sys
import threading
import time
from pathlib import Path

import pytest

from nemotrt.exporter.engines import builder_process
from nemotrt.exporter.engines.builder import EngineRequest, EngineResult, Progress
from nemotrt.exporter.engines.builder_process import run_builder
from nemotrt.exporter.errors import CompileError
from nemotrt.exporter.runtime.backends import backend

PREAMBLE = """
import json, os, signal, sys, time
request = json.load(sys.stdin)
events = os.fdopen(int(sys.argv[1]), "w", buffering=1)
def emit(**event): events.write(json.dumps(event) + "\\n")
"""
REQUEST = EngineRequest(runtime="tensorrt", graph="model.onnx", plugins=["layers.0.mixer.conv"])
TENSORRT = backend("tensorrt")


def run(code: str, *, stalled_after: float = 20.0, seen: list[int] | None = None) -> EngineResult:
    """A stand-in for the builder that runs this code."""
    advance = (lambda _: None) if seen is None else seen.append
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(builder_process, "PROGRAM", (sys.executable, "-c", PREAMBLE + code))
        patch.setattr(builder_process, "STALLED_AFTER", stalled_after)
        return run_builder(REQUEST, TENSORRT, advance=advance)


def test_the_result_and_the_progress_come_through() -> None:
    seen: list[int] = []
    result = run(
        """
assert request["plugins"] == ["layers.0.mixer.conv"]
emit(step=0, phase="Building engine"); emit(step=400, phase="Timing")
emit(built={"version": "11.0", "pools_seen": True})
""",
        seen=seen,
    )
    assert result == EngineResult("11.0", True)
    assert seen == [0, 400, 600]


def test_a_refusal_keeps_its_words() -> None:
    with pytest.raises(CompileError, match="TensorRT does not take the graph: no") as caught:
        run('emit(error="TensorRT does not take the graph: no", hint="export it again"); sys.exit(1)')
    assert caught.value.hint == "export it again"


def test_an_abort_is_an_error_with_its_last_words() -> None:
    with pytest.raises(CompileError, match="ended with SIGABRT in the phase Timing: terminate called"):
        run(
            """
emit(step=1, phase="Timing")
print("terminate called without an active exception", file=sys.stderr, flush=True)
os.abort()
"""
        )


def test_a_crash_without_a_word_is_an_error() -> None:
    with pytest.raises(CompileError, match="TensorRT's builder ended with SIGSEGV: it printed nothing"):
        run("os.kill(os.getpid(), signal.SIGSEGV)")


def test_a_kill_is_taken_for_lack_of_memory() -> None:
    with pytest.raises(
        CompileError,
        match=r"was killed in the phase Tuning, most likely for lack of memory: it had 0\.[0-9] GB",
    ):
        run(
            'held = bytearray(200 << 20); emit(step=1, phase="Tuning"); time.sleep(0.6); os.kill(os.getpid(), 9)'
        )


def test_an_exception_shows_its_last_line() -> None:
    with pytest.raises(CompileError, match="failed with exit code 1: ValueError: no such thing"):
        run('raise ValueError("no such thing")')


def test_a_result_from_a_builder_that_then_failed_is_none() -> None:
    with pytest.raises(CompileError, match="failed with exit code 3"):
        run('emit(built={"version": "11.0"}); events.close(); sys.exit(3)')


def test_a_builder_that_says_nothing_is_an_error() -> None:
    with pytest.raises(CompileError, match="failed with exit code 0"):
        run("pass")


def test_a_stalled_builder_is_ended() -> None:
    started = time.monotonic()
    with pytest.raises(CompileError, match="no progress for 1 s in the phase Waiting"):
        run('emit(step=1, phase="Waiting"); time.sleep(60)', stalled_after=0.8)
    assert time.monotonic() - started < 10


def test_ctrl_c_ends_the_builder(tmp_path: Path) -> None:
    pid_file = tmp_path / "pid"
    timer = threading.Timer(0.1, _interrupt_when, [pid_file])
    timer.start()
    with pytest.raises(KeyboardInterrupt):
        run(f'open({str(pid_file)!r}, "w").write(str(os.getpid())); emit(step=1, phase="x"); time.sleep(60)')
    timer.join()
    with pytest.raises(ProcessLookupError):
        os.kill(int(pid_file.read_text()), 0)


def _interrupt_when(file: Path) -> None:
    while not (file.is_file() and file.read_text()):
        time.sleep(0.02)
    os.kill(os.getpid(), signal.SIGINT)


def test_the_builder_finds_its_library_under_its_bare_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LD_LIBRARY_PATH", "/elsewhere")
    target = tmp_path / "libtensorrt_rtx.so.1"
    target.touch()
    monkeypatch.setattr(builder_process, "linked_library", lambda backend: target)
    folder = tmp_path / "folder"
    folder.mkdir()
    environment = builder_process._environment(backend("tensorrt-rtx"), folder)
    assert environment["LD_LIBRARY_PATH"] == f"{folder}:/elsewhere"
    assert (folder / "libtensorrt_rtx.so").resolve() == target
    assert builder_process._environment(TENSORRT, folder) is os.environ


def test_nested_phases_add_up_and_never_go_back() -> None:
    progress = Progress()
    seen = []
    progress.start("all", None, 4)
    progress.start("part", "all", 2)
    for phase, step in (("part", 0), ("part", 1), ("all", 0), ("all", 1)):
        if (phase, step) == ("all", 0):
            progress.finish("part")
        progress.complete(phase, step)
        seen.append(progress.permille)
    progress.complete("unheard of", 3)
    assert seen == [125, 250, 250, 500]
    progress.finish("all")
    progress.start("again", None, 10)
    progress.complete("again", 0)
    assert progress.permille == 500
