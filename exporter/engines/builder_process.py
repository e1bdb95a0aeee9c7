"""Runs the engine builder in a process of its own, so that its end, however it ends, is an error in words."""

from __future__ import annotations

import json
import os
import selectors
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import IO, Any

from nemotrt.exporter import environment
from nemotrt.exporter.engines.builder import EngineRequest, EngineResult
from nemotrt.exporter.errors import CompileError
from nemotrt.exporter.progress import Advance, ignore
from nemotrt.exporter.runtime.backends import Backend, library_path
from nemotrt.plugins.kernel_store import cache_folder

STALLED_AFTER = 3600.0
"""Seconds without progress after which a build is given up: no step of one takes minutes."""

PROGRAM = (sys.executable, "-P", "-m", "nemotrt.exporter.engines.builder")


@dataclass
class _Watched:
    """What was heard from the builder."""

    result: EngineResult | None = None
    error: CompileError | None = None
    phase: str = ""
    permille: int = 0
    peak_bytes: int = 0


def run_builder(
    request: EngineRequest,
    backend: Backend,
    *,
    advance: Advance = ignore,
    stalled_after: float = STALLED_AFTER,
    program: Sequence[str] = PROGRAM,
) -> EngineResult:
    """What the builder built; `advance` hears of a thousand steps in all.

    Raises CompileError with the cause when it refuses, crashes, is killed or stalls. Ctrl-C ends the builder.
    """
    watched = _Watched()
    with tempfile.TemporaryFile("w+", encoding="utf-8", errors="replace") as said:
        with _started(request, backend, program, said) as (process, events):
            is_stalled = _watch(process, events, watched, advance, stalled_after)
            if is_stalled:
                process.kill()
            code = process.wait()
        if is_stalled:
            raise CompileError(
                f"{backend.title} made no progress for {stalled_after:.0f} s"
                + (f" in the phase {watched.phase}" if watched.phase else ""),
                hint="a machine that is short of memory or cores may need longer: free some of them",
            )
        if watched.error:
            raise watched.error
        if watched.result is None or code:
            said.seek(0)
            raise _death(code, watched, backend, said.read())
    advance(1000 - watched.permille)
    return watched.result


@contextmanager
def _started(
    request: EngineRequest, backend: Backend, program: Sequence[str], said: IO[str]
) -> Iterator[tuple[subprocess.Popen[str], IO[bytes]]]:
    """The builder, working; it does not outlive the context."""
    reader, writer = os.pipe()
    with os.fdopen(reader, "rb", buffering=0) as events:
        try:
            process = subprocess.Popen(
                [*program, str(writer)],
                stdin=subprocess.PIPE,
                stdout=said,
                stderr=said,
                text=True,
                pass_fds=(writer,),
                env=_environment(backend),
                start_new_session=True,  # Ctrl-C is this process' to answer
            )
        finally:
            os.close(writer)
        with process:
            try:
                assert process.stdin
                # A builder that has ended already says why by its exit code.
                with _unless_ended():
                    process.stdin.write(json.dumps(asdict(request)))
                    process.stdin.close()
                yield process, events
            finally:
                process.kill()


@contextmanager
def _unless_ended() -> Iterator[None]:
    try:
        yield
    except BrokenPipeError:
        return


def _environment(backend: Backend) -> Mapping[str, str]:
    folder = library_path(backend, cache_folder())
    if folder is None:
        return os.environ
    searched = os.environ.get("LD_LIBRARY_PATH", "")
    return os.environ | {"LD_LIBRARY_PATH": f"{folder}:{searched}" if searched else str(folder)}


def _watch(
    process: subprocess.Popen[str],
    events: IO[bytes],
    watched: _Watched,
    advance: Advance,
    stalled_after: float,
) -> bool:
    """Hear the builder out; gives whether it stalled."""
    selector = selectors.DefaultSelector()
    selector.register(events, selectors.EVENT_READ)
    heard, rest = time.monotonic(), b""
    with selector:
        while True:
            watched.peak_bytes = max(watched.peak_bytes, _resident(process.pid))
            if not selector.select(timeout=min(0.5, stalled_after)):
                if time.monotonic() - heard > stalled_after:
                    return True
                continue
            received = os.read(events.fileno(), 1 << 16)
            if not received:
                return False
            heard = time.monotonic()
            *lines, rest = (rest + received).split(b"\n")
            for line in lines:
                _hear(json.loads(line), watched, advance)


def _hear(event: dict[str, Any], watched: _Watched, advance: Advance) -> None:
    if "built" in event:
        watched.result = EngineResult(**event["built"])
    elif "error" in event:
        watched.error = CompileError(event["error"], hint=event["hint"])
    else:
        watched.phase = event["phase"]
        advance(event["step"] - watched.permille)
        watched.permille = event["step"]


def _resident(pid: int) -> int:
    """Bytes of memory that the process has; 0 when it has ended."""
    try:
        text = Path(f"/proc/{pid}/statm").read_text(encoding="ascii")
    except OSError:
        return 0
    return int(text.split()[1]) * os.sysconf("SC_PAGE_SIZE")


def _death(code: int, watched: _Watched, backend: Backend, said: str) -> CompileError:
    """Why a builder ended without a word."""
    phase = f" in the phase {watched.phase}" if watched.phase else ""
    if code == -signal.SIGKILL:
        return CompileError(
            f"{backend.title}'s builder was killed{phase}, most likely for lack of memory:"
            f" it had {watched.peak_bytes / 1e9:.1f} GB, this machine has {environment.memory_bytes() / 1e9:.1f} GB",
            hint="end other programs, or build on a machine with more memory",
        )
    last = next((line.strip() for line in reversed(said.splitlines()) if line.strip()), "it said nothing")
    how = f"ended with {signal.Signals(-code).name}" if code < 0 else f"failed with exit code {code}"
    return CompileError(
        f"{backend.title}'s builder {how}{phase}: {last}",
        hint="its log says more, where --debug shows it; --runtime onnx builds the bundle without engines",
    )
