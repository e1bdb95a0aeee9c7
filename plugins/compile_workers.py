"""Processes that compile kernels side by side: a compiler that aborts ends only its own."""

from __future__ import annotations

import contextlib
import json
import os
import queue
import re
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path
from types import TracebackType
from typing import IO, Any

from nemotrt.plugins.kernel_index import KernelError


class _Worker:
    """One process of `cubin.py`."""

    def __init__(self, store: Path, scratch: str) -> None:
        # Lives as long as the process does.
        self._log: IO[str] = tempfile.TemporaryFile("w+", encoding="utf-8", errors="replace")  # noqa: SIM115
        # No setting of Triton's reaches a worker: one interprets kernels, others change what comes out.
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
            start_new_session=True,  # so that it ends with the assembler that it may have started
        )

    def ask(self, title: str, request: dict[str, Any]) -> dict[str, Any]:
        """The worker's answer; raises KernelError with the title and the first line of why it has none."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        with contextlib.suppress(BrokenPipeError):  # it ended: there will be no answer
            self._process.stdin.write(json.dumps(request) + "\n")
            self._process.stdin.flush()
        line = self._process.stdout.readline()
        answer: dict[str, Any] = json.loads(line) if line else {"error": self._end(), "details": ""}
        if "error" in answer:
            complaint = self._complaint()
            error = KernelError(f"{title}: {answer['error']}{complaint and f' ({complaint})'}")
            error.add_note(answer["details"])
            raise error
        return answer

    def _end(self) -> str:
        return f"the compiler ended with status {self._process.wait()}"

    def _complaint(self) -> str:
        """The log's first line on what went wrong in MLIR or LLVM, whose exceptions do not tell."""
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
    """Up to `limit` workers, started as they are needed, that write into one store."""

    def __init__(self, store: Path, limit: int) -> None:
        self._store = store
        self._limit = limit
        self._scratch = tempfile.TemporaryDirectory(prefix="nemo-kernels-", ignore_cleanup_errors=True)
        self._workers: list[_Worker] = []
        self._idle: queue.SimpleQueue[_Worker] = queue.SimpleQueue()

    def __enter__(self) -> Workers:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._close()
        self._scratch.cleanup()

    def ask(
        self, requests: dict[str, dict[str, Any]], done: Callable[[str], None]
    ) -> dict[str, dict[str, Any]]:
        """The answers to requests, both by title; raises the first failure and starts nothing more.

        `done` is called with each title as it is answered, in any order, from one thread at a time.
        """
        executor = ThreadPoolExecutor(max(1, min(self._limit, len(requests))))
        futures = {
            executor.submit(self._answer, title, request): title for title, request in requests.items()
        }
        try:
            for future in as_completed(futures):
                future.result()
                done(futures[future])
        except BaseException:
            executor.shutdown(wait=False, cancel_futures=True)
            self._close()  # a thread that still waits for an answer gets none
            raise
        finally:
            executor.shutdown()
        return {title: future.result() for future, title in futures.items()}

    def _answer(self, title: str, request: dict[str, Any]) -> dict[str, Any]:
        try:
            worker = self._idle.get_nowait()
        except queue.Empty:
            worker = _Worker(self._store, self._scratch.name)
            self._workers.append(worker)
        answer = worker.ask(title, request)
        self._idle.put(worker)
        return answer

    def _close(self) -> None:
        for worker in self._workers:
            worker.close()
