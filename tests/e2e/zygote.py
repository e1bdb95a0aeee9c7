"""A process that has imported everything and computed nothing: each command that it is told runs in a fork of it.

Imports take seconds, so that a process for each signal would cost minutes. A line of JSON in, one line out:
    {"run": [arguments], "stderr": path}   → the fork's process id
    {"wait": process id}                   → its exit code, negative for the signal that ended it
"""

from __future__ import annotations

import json
import os
import signal
import sys
from pathlib import Path

import rich.progress  # noqa: F401

import nemotrt.exporter.pipelines.build
import nemotrt.exporter.stages.bundle
import nemotrt.exporter.stages.load
import nemotrt.exporter.stages.lower
import nemotrt.exporter.stages.trace
import nemotrt.exporter.validation.validate  # noqa: F401
from nemotrt.exporter.cli import main
from nemotrt.exporter.runtime import ort

ort.load()


def run(arguments: list[str], stderr: Path) -> int:
    """Run the command in a fork, as the program does; gives its process id."""
    child = os.fork()
    if child:
        return child
    signal.signal(signal.SIGINT, signal.default_int_handler)
    file = os.open(stderr, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    for descriptor in (1, 2):
        os.dup2(file, descriptor)
    sys.argv = ["nemo-export", *arguments]
    code = 1
    try:
        main()
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else 0 if end.code is None else 1
    finally:
        os._exit(code)


def serve() -> None:
    """Answer line by line until the input ends."""
    for line in sys.stdin:
        order = json.loads(line)
        if "run" in order:
            answer = run(order["run"], Path(order["stderr"]))
        else:
            _, status = os.waitpid(order["wait"], 0)
            answer = os.waitstatus_to_exitcode(status)
        sys.stdout.write(f"{answer}\n")
        sys.stdout.flush()


if __name__ == "__main__":
    serve()
