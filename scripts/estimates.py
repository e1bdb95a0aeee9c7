#!/usr/bin/env python3
"""Builds a checkpoint, and compares each stage with what `nemo-export check` estimates for it.

Memory is the peak of anonymous memory of all processes, because the system drops mapped files when memory is short.
CPU time is that of all processes. Bytes written are the disk blocks of the bundle's own files, without holes.
"""

from __future__ import annotations

import json
import os
import re
import resource
import tempfile
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import click

from nemotrt.exporter.config import PRECISIONS, BuildConfig
from nemotrt.exporter.errors import ValidationError
from nemotrt.exporter.pipelines.build import build
from nemotrt.exporter.progress import Advance, ignore

SAMPLING_SECONDS = 0.02

ANONYMOUS = re.compile(r"^RssAnon:\s+(\d+) kB", re.MULTILINE)
"""In a process's status (proc_pid_status(5)); a process that has ended but was not waited for has no such line."""

Stage = dict[str, float]


class Measuring:
    """A `Progress` that measures each stage; stages with the same name are added up."""

    def __init__(self, workspace: Path) -> None:
        self._workspace = workspace
        self.stages: dict[str, Stage] = {}

    @contextmanager
    def stage(
        self, name: str, what: str, *, total: int | None = None, is_bytes: bool = False
    ) -> Iterator[Advance]:
        """Measure the stage while the context is open."""
        seconds, written = cpu_seconds(), block_bytes(self._workspace)
        with peak_memory() as peak:
            yield ignore
        stage = self.stages.setdefault(
            name, dict.fromkeys(("memory_bytes", "disk_bytes", "cpu_seconds"), 0.0)
        )
        stage["memory_bytes"] = max(stage["memory_bytes"], peak[0])
        stage["disk_bytes"] += max(0, block_bytes(self._workspace) - written)
        stage["cpu_seconds"] += cpu_seconds() - seconds


@contextmanager
def peak_memory() -> Iterator[list[int]]:
    """The peak of anonymous memory, in a list of one number that is complete when the context closes."""
    peak, closed = [anonymous_memory()], threading.Event()

    def sample() -> None:
        while not closed.wait(SAMPLING_SECONDS):
            peak[0] = max(peak[0], anonymous_memory())

    thread = threading.Thread(target=sample)
    thread.start()
    try:
        yield peak
    finally:
        closed.set()
        thread.join()


def anonymous_memory() -> int:
    """Bytes of anonymous memory of this process and its descendants."""
    total, processes = 0, [os.getpid()]
    while processes:
        folder = Path("/proc") / str(processes.pop())
        with suppress(OSError):  # it may have ended
            if anonymous := ANONYMOUS.search((folder / "status").read_text()):
                total += 1024 * int(anonymous[1])
            for children in folder.glob("task/*/children"):
                processes += map(int, children.read_text().split())
    return total


def cpu_seconds() -> float:
    """CPU time of this process and of its children that have ended."""
    usages = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(usage.ru_utime + usage.ru_stime for usage in usages)


def block_bytes(folder: Path) -> int:
    """Disk space of the folder's own files; a file with a second hard link belongs to the checkpoint."""
    stats = [path.stat() for path in folder.rglob("*") if path.is_file()]
    return sum(512 * stat.st_blocks for stat in stats if stat.st_nlink == 1)


def measure(config: BuildConfig) -> dict[str, Stage]:
    """Each stage of a build; call it in a process that has done nothing else."""
    progress = Measuring(config.output.parent / f".{config.output.name}.building")
    with suppress(ValidationError):  # failed gates take just as long
        build(config, progress)
    return progress.stages


@click.command()
@click.argument("checkpoint", type=click.Path(exists=True, file_okay=False, path_type=Path))
@click.option("--precision", type=click.Choice(PRECISIONS))
@click.option("--runtime", default="onnx")
@click.option("--sm", "sms", type=int, multiple=True)
@click.option("--layers", default="")
@click.option("--weights", type=click.Choice(("copy", "link")), default="copy")
@click.option("--no-validate", is_flag=True)
@click.option(
    "--folder", type=click.Path(path_type=Path), help="Where to build. [default: a temporary folder]"
)
@click.option("--json", "as_json", is_flag=True, help="Print only what was measured.")
def main(
    checkpoint: Path,
    precision: str | None,
    runtime: str,
    sms: tuple[int, ...],
    layers: str,
    weights: str,
    no_validate: bool,
    folder: Path | None,
    as_json: bool,
) -> None:
    """Build CHECKPOINT, and print each stage's estimate, measurement and their ratio."""
    with tempfile.TemporaryDirectory(dir=folder) as temporary:
        config = BuildConfig(
            checkpoint,
            Path(temporary) / "bundle",
            precision=precision or "",
            runtime=runtime,
            sms=sms,
            layers=layers,
            weights=weights,
            validate=not no_validate,
        )
        measured = measure(config)
    if as_json:
        click.echo(json.dumps(measured))
        return
    from nemotrt.exporter.pipelines.check import check, read_headers

    headers = read_headers(checkpoint, layers)
    result = check(headers, precision or "", runtime=runtime, sms=sms, weights=weights)
    for estimate in result.estimates:
        if stage := measured.get(estimate.stage):
            cells = [cell(name, getattr(estimate, name), number) for name, number in stage.items()]
            click.echo(f"{estimate.stage:<9}" + "".join(cells))


def cell(name: str, estimate: float, measured: float) -> str:
    """One quantity of one stage as a table cell."""
    unit, scale = (" s", 1.0) if name == "cpu_seconds" else (" MB", 1e6)
    ratio = f"({estimate / measured:.2f} ×)" if measured else ""
    label = name.partition("_")[0]
    return f"  {label:>6} {estimate / scale:9.1f}{unit} for {measured / scale:9.1f}{unit} {ratio:<9}"


if __name__ == "__main__":
    main()
