"""Runs a program of this package in a child process, which a hostile file may crash, and limits what it uses."""

import resource
import signal
import subprocess
import sys

from nemotrt.exporter.errors import ExportError


class CrashedError(Exception):
    """A signal ended the child before it answered: `ended with SIGABRT`."""

    def __init__(self, number: int) -> None:
        super().__init__(f"ended with {signal.Signals(number).name}")
        self.number = number


def run(module: str, purpose: str, *arguments: str, request: bytes = b"") -> bytes:
    """What `python -m MODULE ARGUMENTS` answers on stdout to the request on stdin.

    Raises CrashedError if a signal ends it, and ExportError, which names its purpose, if it does not run.
    """
    done = subprocess.run(
        (sys.executable, "-P", "-m", module, *arguments),
        input=request,
        capture_output=True,
        check=False,
        start_new_session=True,  # this process handles Ctrl-C, and ends the other one
    )
    if done.returncode < 0:
        raise CrashedError(-done.returncode)
    if done.returncode:
        (*_, reason) = done.stderr.decode(errors="replace").splitlines() or [f"exit code {done.returncode}"]
        raise ExportError(f"the program that {purpose} does not run: {reason}")
    return done.stdout


def limit(kind: int, value: int) -> None:
    """Lower a limit of this process, one of resource.RLIMIT_*; one that is lower already stays."""
    limits = [value, *(each for each in resource.getrlimit(kind) if each != resource.RLIM_INFINITY)]
    resource.setrlimit(kind, (min(limits), resource.getrlimit(kind)[1]))
