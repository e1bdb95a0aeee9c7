"""Worker processes that compile kernels in parallel, so that a compiler that aborts ends only its own process."""

from __future__ import annotations

import contextlib
import json
import os
import re
import signal
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path
from typing import IO, Any

from nemotrt.plugins.kernel_index import KernelError


class _Worker:
    """One `cubin.py` process."""

    def __init__(self, store: Path, scratch: str) -> None:
        # Open as long as the process runs.
        self._log: IO[str] = tempfile.TemporaryFile("w+", encoding="utf-8", errors="replace")  # noqa: SIM115
        # Drop Triton's settings: TRITON_INTERPRET would prevent compiling, and others change the result.
        environment = {name: value for name, value in os.environ.items() if not name.startswith("TRITON_")}
        environment |= {"TRITON_CACHE_DIR": scratch, "TMPDIR": scratch}
        self._process = subprocess.Popen(
            [sys.executable, "-P", "-m", "nemotrt.plugins.cubin", str(store)],
            env=environment,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._log,
            text=True,
            encoding="utf-8",
            start_new_session=True,  # so that `close` ends the assembler too
        )

    def ask(self, title: str, request: dict[str, Any]) -> dict[str, Any]:
        """The worker's answer; raises KernelError with the title and the reason if it fails."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        with contextlib.suppress(BrokenPipeError):  # the process has ended, so readline returns nothing
            self._process.stdin.write(json.dumps(request) + "\n")
            self._process.stdin.flush()
        if line := self._process.stdout.readline():
            answer: dict[str, Any] = json.loads(line)
        else:
            answer = {"error": f"the compiler ended with status {self._process.wait()}", "details": ""}
        if "error" in answer:
            log = self._logged_error()
            error = KernelError(f"{title}: {answer['error']}{log and f' ({log})'}")
            error.add_note(answer["details"])
            raise error
        return answer

    def _logged_error(self) -> str:
        """The first error line that MLIR or LLVM wrote to stderr, which their exceptions do not contain."""
        self._log.seek(0)
        lines = [line.strip() for line in self._log if re.search(r"\berror\s*:", line, re.IGNORECASE)]
        return lines[0] if lines else ""

    def close(self) -> None:
        if self._process.poll() is None:
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()
        for stream in (self._process.stdin, self._process.stdout, self._log):
            if stream is not None:
                with contextlib.suppress(BrokenPipeError):
                    stream.close()


class Workers:
    """Up to `limit` workers, started on demand, that write into one store."""

    def __init__(self, store: Path, limit: int) -> None:
        self._store = store
        self._executor = ThreadPoolExecutor(limit, initializer=self._start)
        self._scratch = tempfile.TemporaryDirectory(prefix="nemo-kernels-", ignore_cleanup_errors=True)
        self._workers: list[_Worker] = []
        self._of_thread = threading.local()

    def __enter__(self) -> Workers:
        return self

    def __exit__(self, *_: object) -> None:
        """Drop the requests that have not started, and end the workers."""
        self._executor.shutdown(wait=False, cancel_futures=True)
        self._close()  # unblocks the threads that wait for an answer
        self._executor.shutdown()
        self._close()  # a thread may have started one meanwhile
        self._scratch.cleanup()

    def ask(self, requests: dict[str, dict[str, Any]]) -> Iterator[tuple[str, dict[str, Any]]]:
        """Each request's title and answer, in the order in which they are answered; raises the first failure."""
        futures = {
            self._executor.submit(self._answer, title, request): title for title, request in requests.items()
        }
        for future in as_completed(futures):
            yield futures[future], future.result()

    def _start(self) -> None:
        worker = self._of_thread.worker = _Worker(self._store, self._scratch.name)
        self._workers.append(worker)

    def _answer(self, title: str, request: dict[str, Any]) -> dict[str, Any]:
        worker: _Worker = self._of_thread.worker
        return worker.ask(title, request)

    def _close(self) -> None:
        for worker in self._workers:
            worker.close()
