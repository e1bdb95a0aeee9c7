"""Compiles the ops' kernels for chosen SMs and dtypes, and links them into the plugin library; no GPU is needed.

It prints each kernel's registers, shared memory and spills. Compiled kernels are cached, so a second run is quick.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Sequence
from pathlib import Path

import click
from rich.console import Console
from rich.progress import Progress
from rich.table import Table

from nemotrt.plugins.build import DTYPES, build, check_known
from nemotrt.plugins.kernel_index import Kernel, KernelError, KernelIndex
from nemotrt.plugins.link import LIBRARY_NAME, Toolchain, find_headers, link
from nemotrt.plugins.variant import SMS


def resource_table(kernels: Sequence[Kernel], every_variant: bool) -> Table:
    """A table of registers, shared memory and spills: the maximum for each kernel, and the variants that spill."""
    table = Table(box=None, header_style="bold", pad_edge=False)
    for name in ("SM", "op", "kernel, variant"):
        table.add_column(name, overflow="fold")
    for name in ("variants", "registers", "shared B", "spilled B"):
        table.add_column(name, justify="right")
    groups: dict[tuple[int, str, str], list[Kernel]] = {}
    for kernel in kernels:
        groups.setdefault((kernel.sm, kernel.op, kernel.variant.kernel), []).append(kernel)
    for (sm, op, name), members in groups.items():
        rows = [(kernel.registers, kernel.shared, kernel.spill_stores) for kernel in members]
        maxima = [max(column) for column in zip(*rows, strict=True)]
        table.add_row(str(sm), op, name, str(len(members)), *map(str, maxima))
        for kernel, row in zip(members, rows, strict=True):
            if every_variant or kernel.spill_stores:
                table.add_row("", "", f"  {kernel.variant.name}", "", *map(str, row), style="dim")
    return table


def compiled(
    folder: Path, sms: Sequence[str], dtypes: Sequence[str], names: Sequence[str], jobs: int | None
) -> KernelIndex:
    """The kernels, compiled with a progress bar; raises KernelError."""
    check_known("SM", sms, [str(sm) for sm in SMS])
    console = Console(stderr=True)
    with Progress(console=console, transient=True, disable=not console.is_terminal) as bar:
        task = bar.add_task("", total=None, visible=False)

        def report(done: int, total: int, title: str) -> None:
            bar.update(task, completed=done, total=total, description=title, visible=True)

        return build(
            folder, tuple(map(int, sms)) or SMS, dtypes, names or None, jobs=jobs or 0, report=report
        )


def _split(_: click.Context, __: click.Parameter, values: tuple[str, ...]) -> tuple[str, ...]:
    return tuple(part.strip() for value in values for part in value.split(",") if part.strip())


@click.command()
@click.option(
    "--sm", "sms", multiple=True, callback=_split, help=f"From {', '.join(map(str, SMS))}. Default: all."
)
@click.option(
    "--dtype", "dtypes", multiple=True, callback=_split, help=f"From {', '.join(DTYPES)}. Default: all."
)
@click.option("--op", "names", multiple=True, callback=_split, help="Folder names of ops. Default: all.")
@click.option("--jobs", type=click.IntRange(min=1), help="Parallel compilers. Default: one per core.")
@click.option(
    "--output",
    type=click.Path(path_type=Path),
    default=Path("build/plugins"),
    show_default=True,
    help=f"Output folder for {LIBRARY_NAME} and its description.",
)
@click.option("--compiler", default="g++", show_default=True, help="g++ or a cross compiler.")
@click.option(
    "--sanitize", is_flag=True, help="Enable the address and undefined-behavior sanitizers, for tests."
)
@click.option("--no-link", is_flag=True, help="Only compile the kernels, into the cache.")
@click.option(
    "--verbose", is_flag=True, help="Print every variant, and the full message of a compiler that fails."
)
def main(
    sms: tuple[str, ...],
    dtypes: tuple[str, ...],
    names: tuple[str, ...],
    jobs: int | None,
    output: Path,
    compiler: str,
    sanitize: bool,
    no_link: bool,
    verbose: bool,
) -> None:
    """Compile the ops' kernels and link them with the C++ host into the plugin library.

    Options may be repeated or take lists: --sm 89,120. Kernels are cached in nemo-export in the user's cache
    folder, or in the folder in NEMO_EXPORT_CACHE. TensorRT's headers are searched in the folder in
    TENSORRT_INCLUDE_DIR, or in the system's folders.
    """
    try:
        with tempfile.TemporaryDirectory(prefix="nemo-kernels-") as folder:
            index = compiled(Path(folder) / "kernels", sms, dtypes, names, jobs)
            Console(width=None if os.isatty(1) else 160).print(resource_table(index.kernels, verbose))
            num_bytes = sum(kernel.num_bytes for kernel in index.kernels)
            click.echo(f"{len(index.kernels)} kernels, {num_bytes:,} bytes")
            if not no_link:
                path = link(index, output, Toolchain(compiler, find_headers(os.environ), sanitize))
                click.echo(f"{path.stat().st_size:,} bytes: {path}")
    except KernelError as error:
        if verbose:
            click.echo("\n".join(getattr(error, "__notes__", [])), err=True)
        raise click.ClickException(str(error)) from None


if __name__ == "__main__":
    main()
