"""Runs the engine builder in a child process, and turns its failure, crash or stall into an error."""

import json
import os
import selectors
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import asdict
from pathlib import Path
from typing import IO, Any

from nemotrt.exporter import environment
from nemotrt.exporter.engines.builder import EngineRequest, EngineResult
from nemotrt.exporter.errors import CompileError
from nemotrt.exporter.progress import Advance, ignore
from nemotrt.exporter.runtime.backends import Backend, linked_library

STALLED_AFTER = 3600.0
"""Seconds without progress after which a build is abandoned; no step of a build takes minutes."""

PROGRAM = (sys.executable, "-P", "-m", "nemotrt.exporter.engines.builder")


def run_builder(request: EngineRequest, backend: Backend, *, advance: Advance = ignore) -> EngineResult:
    """Build the engine; `advance` counts up to 1000.

    Raises CompileError with the cause if the builder fails, crashes, is killed or stalls. Ctrl-C ends the builder.
    """
    watch = _Watch(backend, advance)
    with tempfile.TemporaryFile("w+", encoding="utf-8", errors="replace") as output:
        with _started(request, backend, output) as (process, events):
            watch.run(process, events)
            code = process.wait()
        if watch.result is None or code:
            output.seek(0)
            raise watch.error or watch.crash(code, output.read())
    advance(1000 - watch.permille)
    return watch.result


class _Watch:
    """Follows a builder by its events, and explains how it ended."""

    def __init__(self, backend: Backend, advance: Advance) -> None:
        self._backend, self._advance = backend, advance
        self.result: EngineResult | None = None
        self.error: CompileError | None = None
        self.permille = 0
        self._phase = ""
        """The build's current phase, as a clause for an error."""
        self._peak_bytes = 0

    def run(self, process: subprocess.Popen[str], events: IO[bytes]) -> None:
        """Read events until the builder ends; kill it if it stalls."""
        selector = selectors.DefaultSelector()
        selector.register(events, selectors.EVENT_READ)
        last, rest = time.monotonic(), b""
        with selector:
            while True:
                self._peak_bytes = max(self._peak_bytes, _resident(process.pid))
                if selector.select(timeout=min(0.5, STALLED_AFTER)):
                    received = os.read(events.fileno(), 1 << 16)
                    if not received:
                        return
                    last = time.monotonic()
                    *lines, rest = (rest + received).split(b"\n")
                    for line in lines:
                        self._handle(json.loads(line))
                elif time.monotonic() - last > STALLED_AFTER:
                    process.kill()
                    self.error = CompileError(
                        f"{self._backend.title} made no progress for {STALLED_AFTER:.0f} s{self._phase}",
                        hint="a machine that is short of memory or cores may need longer: free some of them",
                    )
                    return

    def _handle(self, event: dict[str, Any]) -> None:
        if "built" in event:
            self.result = EngineResult(**event["built"])
        elif "error" in event:
            self.error = CompileError(event["error"], hint=event["hint"])
        else:
            self._phase = f" in the phase {event['phase']}"
            self._advance(event["step"] - self.permille)
            self.permille = event["step"]

    def crash(self, code: int, output: str) -> CompileError:
        """The error for a builder that ended without reporting one."""
        title = self._backend.title
        if code == -signal.SIGKILL:
            return CompileError(
                f"{title}'s builder was killed{self._phase}, most likely for lack of memory: it had"
                f" {self._peak_bytes / 1e9:.1f} GB, this machine has {environment.memory_bytes() / 1e9:.1f} GB",
                hint="end other programs, or build on a machine with more memory",
            )
        lines = [line.strip() for line in output.splitlines() if line.strip()] or ["it printed nothing"]
        how = f"ended with {signal.Signals(-code).name}" if code < 0 else f"failed with exit code {code}"
        return CompileError(
            f"{title}'s builder {how}{self._phase}: {lines[-1]}",
            hint="its log says more, where --debug shows it; --runtime onnx builds the bundle without engines",
        )


@contextmanager
def _started(
    request: EngineRequest, backend: Backend, output: IO[str]
) -> Iterator[tuple[subprocess.Popen[str], IO[bytes]]]:
    """A running builder, which is killed when the context ends."""
    reader, writer = os.pipe()
    with os.fdopen(reader, "rb", buffering=0) as events, tempfile.TemporaryDirectory() as folder:
        try:
            process = subprocess.Popen(
                [*PROGRAM, str(writer)],
                stdin=subprocess.PIPE,
                stdout=output,
                stderr=output,
                text=True,
                pass_fds=(writer,),
                env=_environment(backend, Path(folder)),
                start_new_session=True,  # this process handles Ctrl-C
            )
        finally:
            os.close(writer)
        with process:
            try:
                assert process.stdin
                # The exit code explains why a builder has ended already.
                with suppress(BrokenPipeError):
                    process.stdin.write(json.dumps(asdict(request)))
                    process.stdin.close()
                yield process, events
            finally:
                process.kill()


def _environment(backend: Backend, folder: Path) -> Mapping[str, str]:
    """The builder's environment, with `backend.linked` in `folder`: a loader reads its path when a process starts."""
    if not backend.linked:
        return os.environ
    (folder / backend.linked).symlink_to(linked_library(backend))
    searched = os.environ.get("LD_LIBRARY_PATH", "")
    return os.environ | {"LD_LIBRARY_PATH": f"{folder}:{searched}" if searched else str(folder)}


def _resident(pid: int) -> int:
    """The resident memory of a process in bytes; 0 if it has ended."""
    try:
        text = Path(f"/proc/{pid}/statm").read_text(encoding="ascii")
    except OSError:
        return 0
    return int(text.split()[1]) * os.sysconf("SC_PAGE_SIZE")
