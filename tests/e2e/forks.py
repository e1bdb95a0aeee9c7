"""Runs commands in forks of a process that has imported everything, so that a command takes no time to start."""

from __future__ import annotations

import json
import os
import select
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import IO

PATIENCE = 60.0
"""Seconds that anything may take before a test is stuck."""


class Zygote:
    """Starts commands in forks of a process that has all imports behind it."""

    def __init__(self) -> None:
        script = Path(__file__).with_name("zygote.py")
        self._process = subprocess.Popen(
            [sys.executable, script], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )

    def run(
        self, *arguments: object, stderr: Path, stdout: Path | None = None, folder: Path | None = None
    ) -> Child:
        """A command that has just begun, in `folder`; without `stdout`, its results go to `stderr` too."""
        order = {"run": [str(argument) for argument in arguments], "stderr": str(stderr)}
        order |= {"stdout": str(stdout or stderr), "folder": str(folder or Path.cwd())}
        return Child(self, self._ask(order), stderr)

    def wait(self, process: int) -> int:
        """The exit code of a fork, negative for the signal that ended it; what takes longer than PATIENCE is killed."""
        self._send({"wait": process})
        if not select.select([self._process.stdout], [], [], PATIENCE)[0]:
            os.kill(process, signal.SIGKILL)
        return self._answer()

    def _ask(self, order: dict[str, object]) -> int:
        self._send(order)
        return self._answer()

    def _send(self, order: dict[str, object]) -> None:
        assert self._process.stdin
        self._process.stdin.write(json.dumps(order) + "\n")
        self._process.stdin.flush()

    def _answer(self) -> int:
        assert self._process.stdout
        return int(self._process.stdout.readline())

    def close(self) -> None:
        """End it."""
        pipes: list[IO[str] | None] = [self._process.stdin, self._process.stdout]
        for pipe in pipes:
            if pipe:
                pipe.close()
        self._process.wait(PATIENCE)


@dataclass(frozen=True)
class Child:
    """A command in a fork, and the file that its stderr goes to."""

    zygote: Zygote
    process: int
    stderr: Path

    def said(self) -> list[str]:
        """Its lines so far."""
        return self.stderr.read_text().splitlines() if self.stderr.exists() else []

    def stop(self) -> None:
        """Hold it, wherever it is, until it is told to go on."""
        os.kill(self.process, signal.SIGSTOP)
        give_up = time.monotonic() + PATIENCE
        while self._state() not in "TZ":
            assert time.monotonic() < give_up
            time.sleep(0.001)

    def _state(self) -> str:
        # The name before it, in brackets, can hold anything.
        return Path(f"/proc/{self.process}/stat").read_text().rpartition(")")[2].split()[0]

    def send(self, number: int) -> None:
        """Send a signal, and let it go on."""
        os.kill(self.process, number)
        os.kill(self.process, signal.SIGCONT)

    def wait(self) -> int:
        """Its exit code, negative for the signal that ended it."""
        return self.zygote.wait(self.process)
