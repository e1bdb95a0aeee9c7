"""A process that has imported everything and computed nothing: each command that it is told runs in a fork of it.

Imports take seconds, so that a process for each signal would cost minutes. A line of JSON in, one line out:
    {"run": [arguments], "stdout": path, "stderr": path, "folder": path}   → the fork's process id
    {"wait": process id}   → its exit code, negative for the signal that ended it
"""

from __future__ import annotations

import json
import os
import resource
import signal
import sys
from pathlib import Path

import rich.progress  # noqa: F401
import torch

import nemotrt.exporter.pipelines.build
import nemotrt.exporter.stages.bundle
import nemotrt.exporter.stages.load
import nemotrt.exporter.stages.lower
import nemotrt.exporter.stages.trace
import nemotrt.exporter.validation.validate  # noqa: F401
from nemotrt.exporter.cli import main
from nemotrt.exporter.runtime import ort

ort.load()
# The first export imports as much again. A tensor without data starts no thread.
torch.export.export(torch.nn.Identity(), (torch.zeros(2, device="meta"),))

MAX_MEMORY = 6 << 30
"""Bytes of addresses that a command may use: many times what a small model needs."""


def run(arguments: list[str], stdout: Path, stderr: Path, folder: Path) -> int:
    """Run the command in a fork, as the program does; gives its process id."""
    child = os.fork()
    if child:
        return child
    signal.signal(signal.SIGINT, signal.default_int_handler)
    resource.setrlimit(resource.RLIMIT_AS, (MAX_MEMORY, MAX_MEMORY))
    for descriptor, path in ((1, stdout), (2, stderr)):
        os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_APPEND), descriptor)
    os.chdir(folder)
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
            paths = (Path(order[name]) for name in ("stdout", "stderr", "folder"))
            answer = run(order["run"], *paths)
        else:
            _, status = os.waitpid(order["wait"], 0)
            answer = os.waitstatus_to_exitcode(status)
        sys.stdout.write(f"{answer}\n")
        sys.stdout.flush()


if __name__ == "__main__":
    serve()
