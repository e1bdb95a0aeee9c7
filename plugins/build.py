"""Compiles the ops' kernels for chosen SMs and dtypes with no GPU: `python -m nemotrt.plugins.build`.

What each variant was compiled from is hashed, so that nothing is compiled twice; where nothing changed,
neither Triton nor torch is imported. See `kernel_index` for what the output folder holds.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import importlib.util
import os
import tempfile
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import click
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from nemotrt.plugins.compile_workers import Workers
from nemotrt.plugins.kernel_index import INDEX_NAME, Kernel, KernelError, KernelIndex, kernel_of
from nemotrt.plugins.kernel_store import KernelStore, cache_folder, digest
from nemotrt.plugins.spec import ops
from nemotrt.plugins.variant import SMS, supports_fp8

DTYPES = {"fp32": "fp32", "fp16": "fp16", "bf16": "bf16", "fp8": "fp8e4nv"}
"""Dtypes to choose from → Triton's names of them."""

Report = Callable[[int, int, str], None]
"""Takes how many kernels are compiled, of how many, and the latest."""


@dataclass(frozen=True)
class Selection:
    """Which kernels to compile; raises KernelError on what there is none of.

    Empty `dtypes` mean all that an SM has.
    """

    sms: tuple[int, ...] = SMS
    dtypes: tuple[str, ...] = ()
    ops: tuple[str, ...] = field(default_factory=lambda: tuple(packages()))

    def __post_init__(self) -> None:
        _check_known("SM", self.sms, SMS)
        _check_known("dtype", self.dtypes, tuple(DTYPES))
        _check_known("op", self.ops, tuple(packages()))
        if not self.sms or not self.ops:
            raise KernelError("nothing to compile: choose at least one SM and one op")
        if "fp8" in self.dtypes:
            self._check_fp8()

    def _check_fp8(self) -> None:
        able = ", ".join(str(sm) for sm in SMS if supports_fp8(sm))
        for sm in self.sms:
            if not supports_fp8(sm):
                raise KernelError(
                    f"SM {sm} has no FP8 tensor cores: leave fp8 out for it, or choose from SM {able}"
                )
        if set(self.dtypes) == {"fp8"}:
            raise KernelError("fp8 is for weights and caches: choose fp16 or bf16 beside it, for activations")


def _check_known(name: str, chosen: Sequence[object], known: Sequence[object]) -> None:
    for value in chosen:
        if value not in known:
            choices = ", ".join(map(str, known))
            raise KernelError(f"there are no kernels for {name} {value}: choose from {choices}")


def packages() -> dict[str, str]:
    """Each op's folder name → its package."""
    return {spec.torch_name: spec.package for spec in ops()}


def selected(variants: Sequence[dict[str, Any]], dtypes: Iterable[str]) -> list[dict[str, Any]]:
    """The variants that a model in these dtypes launches; all, where there are no dtypes.

    A variant is kept when every narrow dtype in it is chosen: those of its pointers, and those that its
    constants name. One in FP32 throughout is kept where FP32 is chosen, or where its kernel has no other.
    """
    chosen = {DTYPES[dtype] for dtype in dtypes}
    if not chosen:
        return list(variants)
    marks = [_marks(variant) for variant in variants]
    marked = {variant["kernel"] for variant, mark in zip(variants, marks, strict=True) if mark}
    return [
        variant
        for variant, mark in zip(variants, marks, strict=True)
        if mark <= chosen and (mark or "fp32" in chosen or variant["kernel"] not in marked)
    ]


def _marks(variant: dict[str, Any]) -> set[str]:
    pointers = {kind.removeprefix("*") for kind in variant["signature"].values() if kind.startswith("*")}
    named = {value for value in variant["constants"].values() if isinstance(value, str)}
    return (pointers - {"fp32"} | named) & set(DTYPES.values())


def triton_version() -> str:
    """The installed Triton's version, without importing it; raises KernelError that says what to install."""
    for name in ("triton", "pytorch-triton"):
        try:
            return importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    raise KernelError("compiling kernels needs Triton: pip install 'nemo-export[kernels]'")


@dataclass(frozen=True)
class _Op:
    """An op whose kernels are wanted, and a hash of what decides its variants and how they are compiled."""

    name: str
    package: str
    source: str

    @classmethod
    def of(cls, name: str, package: str, triton: str) -> _Op:
        own = sorted(_path(package).parent.glob("*.py"))
        shared = [_path(f"nemotrt.plugins.{module}") for module in ("spec", "variant", "cubin")]
        return cls(name, package, digest([triton, *map(_file_hash, [*own, *shared])]))

    def plan_key(self, sm: int) -> str:
        return digest(["plan", self.package, self.source, sm])


def _path(module: str) -> Path:
    found = importlib.util.find_spec(module)
    if found is None or found.origin is None:
        raise KernelError(f"there is no module {module}: install nemo-export again")
    return Path(found.origin)


def _file_hash(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


@dataclass(frozen=True)
class _Job:
    """One variant to be had for one SM, and the key of its cubin in the store."""

    op: _Op
    sm: int
    variant: dict[str, Any]
    key: str

    @property
    def title(self) -> str:
        return f"{self.op.name}, SM {self.sm}, {self.variant['name']}"

    def request(self) -> dict[str, Any]:
        return {"package": self.op.package, "sm": self.sm, "variant": self.variant, "key": self.key}

    def kernel(self, entry: dict[str, Any]) -> Kernel:
        """The index's entry, from what the store holds."""
        name, aligned = self.variant["name"], self.variant["aligned"]
        fixed = {key: self.variant[key] for key in ("kernel", "constants", "num_stages")}
        fixed["parameters"] = [
            {"name": parameter, "type": kind, "aligned": parameter in aligned}
            for parameter, kind in self.variant["signature"].items()
        ]
        file = f"sm{self.sm}/{self.op.name}/{name}.cubin"
        own = {"op": self.op.name, "sm": self.sm, "variant": name, "file": file, "key": self.key}
        return kernel_of(entry | fixed | own)


def _plans(
    chosen: Sequence[_Op], sms: Sequence[int], store: KernelStore, workers: Workers
) -> dict[tuple[str, int], list[dict[str, Any]]]:
    """Every variant of each op on each SM, from the store or, after a change, from a worker."""
    plans = {(op.name, sm): store.get_note(op.plan_key(sm)) for op in chosen for sm in sms}
    changed = {op: [sm for sm in sms if plans[op.name, sm] is None] for op in chosen}
    requests = {
        f"{op.name}, its variants": {"package": op.package, "sms": missing}
        for op, missing in changed.items()
        if missing
    }
    answers = workers.ask(requests, lambda _: None)
    for op, missing in changed.items():
        for sm in missing:
            plans[op.name, sm] = answers[f"{op.name}, its variants"]["variants"][str(sm)]
            store.put_note(op.plan_key(sm), plans[op.name, sm])
    return plans  # type: ignore[return-value]


def _jobs(selection: Selection, store: KernelStore, workers: Workers, triton: str) -> list[_Job]:
    """Every variant that was chosen, by SM, op and name."""
    known, recipe = packages(), _file_hash(_path("nemotrt.plugins.cubin"))
    chosen = [_Op.of(name, known[name], triton) for name in sorted(set(selection.ops))]
    sms = sorted(set(selection.sms))
    plans = _plans(chosen, sms, store, workers)
    jobs = []
    for sm in sms:
        for op in chosen:
            kept = selected(plans[op.name, sm], selection.dtypes)
            if not kept:
                dtypes = ", ".join(selection.dtypes)
                raise KernelError(f"{op.name} has no kernels for SM {sm} in {dtypes}: choose another dtype")
            for variant in sorted(kept, key=lambda variant: str(variant["name"])):
                jobs.append(_Job(op, sm, variant, digest([triton, recipe, op.package, sm, variant])))
    return jobs


def build(selection: Selection, output: Path, jobs: int = 0, report: Report = lambda *_: None) -> KernelIndex:
    """The chosen kernels, compiled or taken from the cache, in `output`, which then holds nothing else.

    `jobs` is how many compile at once, 0 for as many as there are cores. The folder appears whole or not at
    all, in the place of an earlier one. Raises KernelError, which names op, SM, variant and why one fails.
    """
    triton = triton_version()
    _check_output(output)
    store = KernelStore(cache_folder())
    with Workers(store.folder, jobs or len(os.sched_getaffinity(0))) as workers:
        planned = _jobs(selection, store, workers, triton)
        if (current := _current(output, triton, planned)) is not None:
            return current
        held = {job.key: store.get(job.key) for job in planned}
        missing = {job.title: job for job in planned if held[job.key] is None}
        done = 0

        def advance(title: str) -> None:
            nonlocal done
            done += 1
            report(done, len(missing), title)

        workers.ask({title: job.request() for title, job in missing.items()}, advance)
    held |= {job.key: store.get(job.key) for job in missing.values()}
    return _write(output, triton, [(job, held[job.key]) for job in planned])


def _check_output(output: Path) -> None:
    ours = (output / INDEX_NAME).is_file()
    if output.is_file() or (output.is_dir() and any(output.iterdir()) and not ours):
        raise KernelError(f"{output} holds something other than kernels: choose a new or an empty folder")


def _current(output: Path, triton: str, planned: Sequence[_Job]) -> KernelIndex | None:
    """The output's own index, where it already holds just these kernels, whole."""
    try:
        index = KernelIndex.load(output)
        for kernel in index.kernels:
            index.cubin(kernel)
    except KernelError:
        return None
    files = {str(path.relative_to(output)) for path in output.rglob("*") if path.is_file()}
    same = [kernel.key for kernel in index.kernels] == [job.key for job in planned]
    only = files == {INDEX_NAME, *(kernel.file for kernel in index.kernels)}
    return index if same and only and index.triton == triton else None


def _write(
    output: Path, triton: str, held: Iterable[tuple[_Job, tuple[bytes, dict[str, Any]] | None]]
) -> KernelIndex:
    output.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{output.name}-", dir=output.parent) as temporary:
        folder = Path(temporary) / "kernels"
        folder.mkdir()
        kernels = []
        for job, found in held:
            if found is None:
                raise KernelError(f"{job.title}: it is not in {cache_folder()} any more: try again")
            cubin, entry = found
            kernels.append(job.kernel(entry))
            path = folder / kernels[-1].file
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(cubin)
        KernelIndex(folder, triton, tuple(kernels)).save()
        if output.exists():
            output.rename(Path(temporary) / "replaced")
        folder.rename(output)
    return KernelIndex(output, triton, tuple(kernels))


def resource_table(kernels: Sequence[Kernel], every_variant: bool) -> Table:
    """Registers, shared memory and spills: the most of a kernel's variants, and below it those that spill."""
    table = Table(box=None, header_style="bold", pad_edge=False)
    for name in ("SM", "op", "kernel, variant"):
        table.add_column(name, overflow="fold")
    for name in ("variants", "registers", "shared B", "spilled B"):
        table.add_column(name, justify="right")
    groups: dict[tuple[int, str, str], list[Kernel]] = {}
    for kernel in kernels:
        groups.setdefault((kernel.sm, kernel.op, kernel.kernel), []).append(kernel)
    for (sm, op, name), members in groups.items():
        rows = [(kernel.registers, kernel.shared, kernel.spill_stores) for kernel in members]
        most = [max(column) for column in zip(*rows, strict=True)]
        table.add_row(str(sm), op, name, str(len(members)), *map(str, most))
        for kernel, row in zip(members, rows, strict=True):
            if every_variant or kernel.spill_stores:
                table.add_row("", "", f"  {kernel.variant}", "", *map(str, row), style="dim")
    return table


def _split(_: click.Context, __: click.Parameter, values: tuple[str, ...]) -> tuple[str, ...]:
    return tuple(part.strip() for value in values for part in value.split(",") if part.strip())


def _compile(selection: Selection, output: Path, jobs: int) -> KernelIndex:
    console = Console(stderr=True)
    columns = (TextColumn("compiling"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    title = TextColumn("{task.description}")
    with Progress(*columns, title, console=console, transient=True, disable=not console.is_terminal) as bar:
        task = bar.add_task("", total=None, visible=False)

        def report(done: int, total: int, title: str) -> None:
            bar.update(task, completed=done, total=total, description=title, visible=True)

        return build(selection, output, jobs, report)


@click.command()
@click.option("--sm", "sms", multiple=True, callback=_split, help=f"Of {', '.join(map(str, SMS))}; all.")
@click.option("--dtype", "dtypes", multiple=True, callback=_split, help=f"Of {', '.join(DTYPES)}; all.")
@click.option("--op", "names", multiple=True, callback=_split, help="Ops by their folders' names; all.")
@click.option("--jobs", type=click.IntRange(min=1), help="Kernels compiled at once; as many as cores.")
@click.option(
    "--output",
    type=click.Path(path_type=Path),
    default=Path("build/kernels"),
    show_default=True,
    help="Folder for cubins and kernels.json; replaced whole.",
)
@click.option("--verbose", is_flag=True, help="A row for each variant; a compiler's whole message.")
def main(
    sms: tuple[str, ...],
    dtypes: tuple[str, ...],
    names: tuple[str, ...],
    jobs: int | None,
    output: Path,
    verbose: bool,
) -> None:
    """Compile the ops' kernels ahead of time; no GPU is needed.

    Options may be repeated or hold lists: --sm 89,120. Kernels are kept in nemo-export in the user's cache
    folder, or in the folder that NEMO_EXPORT_CACHE names.
    """
    try:
        _check_known("SM", sms, [str(sm) for sm in SMS])
        selection = Selection(tuple(map(int, sms)) or SMS, dtypes, names or tuple(packages()))
        index = _compile(selection, output, jobs or 0)
    except KernelError as error:
        if verbose:
            click.echo("\n".join(getattr(error, "__notes__", [])), err=True)
        raise click.ClickException(str(error)) from None
    Console(width=None if os.isatty(1) else 160).print(resource_table(index.kernels, verbose))
    num_bytes = sum(kernel.num_bytes for kernel in index.kernels)
    click.echo(f"{len(index.kernels)} kernels, {num_bytes:,} bytes: {output}")


if __name__ == "__main__":
    main()
