#!/usr/bin/env python3
"""What `nemo-export check` estimates of a build, stage by stage, beside what the build then took.

Memory is anonymous: what mapped files take comes on top, and goes when memory is short. CPU time is that of every
process; bytes on the disk are those of the blocks that the bundle's own files hold, not those of holes.
"""

from __future__ import annotations

import json
import os
import re
import resource
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import click

from nemotrt.exporter.config import BuildConfig
from nemotrt.exporter.errors import ValidationError
from nemotrt.exporter.pipelines.build import build
from nemotrt.exporter.progress import Advance, ignore

PERIOD = 0.02
"""Seconds between two looks at memory."""

ANONYMOUS = re.compile(r"^RssAnon:\s+(\d+) kB", re.MULTILINE)
"""Of a process's status (proc_pid_status(5)); that of one which has ended and is not waited for has none."""

OPTIONS = {"ignore_unknown_options": True}


@dataclass
class Measuring:
    """A `Progress` that measures what each stage takes; stages of one name are added up."""

    workspace: Path
    stages: dict[str, dict[str, float]] = field(default_factory=dict)

    @contextmanager
    def stage(
        self, name: str, what: str, *, total: int | None = None, is_bytes: bool = False
    ) -> Iterator[Advance]:
        """Measure a stage."""
        seconds, written = _cpu_seconds(), _blocks(self.workspace)
        with _peak() as peak:
            yield ignore
        took = {
            "memory_bytes": peak[0],
            "disk_bytes": max(0, _blocks(self.workspace) - written),
            "cpu_seconds": _cpu_seconds() - seconds,
        }
        known = self.stages.setdefault(name, dict.fromkeys(took, 0.0))
        known["memory_bytes"] = max(known["memory_bytes"], took["memory_bytes"])
        for quantity in ("disk_bytes", "cpu_seconds"):
            known[quantity] += took[quantity]


@contextmanager
def _peak() -> Iterator[list[int]]:
    """The most anonymous memory that this process and those below it had at once."""
    peak, ended = [_anonymous()], threading.Event()

    def watch() -> None:
        while not ended.wait(PERIOD):
            peak[0] = max(peak[0], _anonymous())

    thread = threading.Thread(target=watch)
    thread.start()
    try:
        yield peak
    finally:
        ended.set()
        thread.join()


def _anonymous() -> int:
    total, processes = 0, [os.getpid()]
    while processes:
        folder = Path("/proc") / str(processes.pop())
        with suppress(OSError):  # it may have ended
            status = (folder / "status").read_text()
            if anonymous := ANONYMOUS.search(status):
                total += 1024 * int(anonymous[1])
            for children in folder.glob("task/*/children"):
                processes += map(int, children.read_text().split())
    return total


def _cpu_seconds() -> float:
    used = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(one.ru_utime + one.ru_stime for one in used)


def _blocks(folder: Path) -> int:
    """Bytes that the folder's own files hold: a file with a second hard link is the checkpoint's."""
    stats = [path.stat() for path in folder.rglob("*") if path.is_file()]
    return sum(512 * one.st_blocks for one in stats if one.st_nlink == 1)


def measured(config: BuildConfig) -> dict[str, dict[str, float]]:
    """A build's stages."""
    progress = Measuring(config.output.parent / f".{config.output.name}.building")
    with suppress(ValidationError):  # a gate that fails takes as long
        build(config, progress)
    return progress.stages


def compared(checkpoint: Path, options: list[str]) -> dict[str, Any]:
    """A stage → a quantity → what was estimated, what was measured, and the one over the other."""
    tool = str(Path(sys.executable).with_name("nemo-export"))
    shared = ("--precision", "--runtime", "--sm", "--weights", "--layers")
    asked = [
        part for pair in zip(options[::2], options[1::2], strict=True) if pair[0] in shared for part in pair
    ]
    checked = json.loads(_stdout([tool, "--quiet", "check", str(checkpoint), "--json", *asked]))
    with tempfile.TemporaryDirectory(dir=checkpoint.resolve().parent) as folder:
        command = [sys.executable, __file__, "run", str(checkpoint), str(Path(folder) / "bundle"), *options]
        took = json.loads(_stdout(command))
    found: dict[str, Any] = {}
    for stage in checked["estimates"]:
        if real := took.get(stage["stage"]):
            found[stage["stage"]] = {
                quantity: (
                    stage[quantity],
                    real[quantity],
                    stage[quantity] / real[quantity] if real[quantity] else None,
                )
                for quantity in real
            }
    return found


def _stdout(command: list[str]) -> str:
    return subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout


@click.group()
def main() -> None:
    """Measure builds."""


@main.command(context_settings=OPTIONS)
@click.argument("checkpoint", type=click.Path(exists=True, file_okay=False, path_type=Path))
@click.argument("options", nargs=-1, type=click.UNPROCESSED)
def compare(checkpoint: Path, options: tuple[str, ...]) -> None:
    """Build CHECKPOINT with OPTIONS of `build` that take a value, and print a table."""
    for stage, quantities in compared(checkpoint, list(options)).items():
        click.echo(f"{stage:<9}" + "".join(_cell(name, *values) for name, values in quantities.items()))


def _cell(name: str, estimate: float, real: float, ratio: float | None) -> str:
    unit, scale = (" s", 1.0) if name.endswith("seconds") else (" MB", 1e6)
    times = f"({ratio:.2f} ×)" if ratio else ""
    return f"  {name.partition('_')[0]:>6} {estimate / scale:9.1f}{unit} for {real / scale:9.1f}{unit} {times:<9}"


@main.command(context_settings=OPTIONS, hidden=True)
@click.argument("checkpoint", type=click.Path(path_type=Path))
@click.argument("output", type=click.Path(path_type=Path))
@click.argument("options", nargs=-1, type=click.UNPROCESSED)
def run(checkpoint: Path, output: Path, options: tuple[str, ...]) -> None:
    """Build in a process that has done nothing else."""
    given = {name.removeprefix("--"): value for name, value in zip(options[::2], options[1::2], strict=True)}
    if sms := given.pop("sm", ""):
        given["sms"] = tuple(map(int, sms.split(",")))  # type: ignore[assignment]
    if given.get("validate") == "no":
        given["validate"] = False  # type: ignore[assignment]
    click.echo(json.dumps(measured(BuildConfig(checkpoint, output, **given))))  # type: ignore[arg-type]


if __name__ == "__main__":
    main()
