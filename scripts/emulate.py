#!/usr/bin/env python3
"""Runs the compiled PTX of every variant in the emulator against the reference: `python scripts/emulate.py`."""

from __future__ import annotations

import os
import sys
import time
from collections import defaultdict
from collections.abc import Iterable
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass

import click
import torch
from emulation import SMS, Compiled, Key, cases, check, launched, num_variants, tolerance
from gpu_check import CheckFailed
from op_cases import DTYPES, Case

from nemotrt.plugins.build import kernels_with_ptx
from nemotrt.plugins.contract import DType
from nemotrt.plugins.emulator.errors import Fault, NotEmulated
from nemotrt.plugins.kernel_index import KernelError


@dataclass(frozen=True)
class Result:
    """The result of one case on one SM; `failure` is empty if it passed."""

    case: Case
    sm: int
    margin: float
    """The largest error of an output as a fraction of its tolerance."""
    seconds: float
    failure: str


def run(case: Case, sm: int, compiled: Compiled, seed: int) -> Result:
    """Run one case; findings are reported in the result."""
    torch.set_num_threads(1)
    started, margin, failure = time.process_time(), float("nan"), ""
    try:
        margin = check(case, sm, compiled, seed)[0] / tolerance(case)
    except (CheckFailed, Fault, NotEmulated) as error:
        failure = f"{type(error).__name__}: {error}"
    return Result(case, sm, margin, time.process_time() - started, failure)


def run_all(planned: dict[tuple[Case, int], dict[Key, None]], jobs: int, seed: int) -> list[Result]:
    """Compile the kernels that are not cached, then run every case."""
    wanted = {key: None for keys in planned.values() for key in keys}

    def report(done: int, total: int, title: str) -> None:
        click.echo(f"compiled {done}/{total} {title}", err=True)

    try:
        compiled = kernels_with_ptx(wanted, jobs=jobs, report=report)
    except KernelError as error:
        raise click.ClickException(str(error)) from None
    results = []
    with ProcessPoolExecutor(jobs) as executor:
        futures = [
            executor.submit(run, case, sm, {key: compiled[key] for key in keys}, seed)
            for (case, sm), keys in planned.items()
        ]
        for done, future in enumerate(as_completed(futures), 1):
            results.append(future.result())
            verdict = results[-1].failure or "pass"
            click.echo(
                f"{done}/{len(futures)} SM {results[-1].sm}, {results[-1].case.title}: {verdict}", err=True
            )
    return results


def print_counts(results: Iterable[Result]) -> None:
    """A line for each op, SM and combination of dtypes."""
    groups = defaultdict(list)
    for result in results:
        labels = " ".join(DType(dtype).label for dtype in result.case.dtype.values())
        groups[result.case.op, result.sm, labels].append(result)
    for (op, sm, labels), group in sorted(groups.items()):
        passed = sum(not result.failure for result in group)
        margin = max((result.margin for result in group if not result.failure), default=float("nan"))
        seconds = sum(result.seconds for result in group)
        verdict = "pass" if passed == len(group) else "FAIL"
        counts = f"{passed} of {len(group)}, at most {margin:.0%} of the tolerance, {seconds:.1f} s"
        click.echo(f"{op:16} SM {sm:<4} {labels:12} {verdict}: {counts}")


@click.command()
@click.option("--op", "names", multiple=True, type=click.Choice(list(DTYPES)), help="Only these ops.")
@click.option(
    "--sm", "sms", multiple=True, type=click.Choice([str(sm) for sm in SMS]), help="Only these SMs."
)
@click.option(
    "--match", default="", help="Only cases whose title contains this, such as mixture or W float8."
)
@click.option("--seed", type=int, default=1, show_default=True, help="Random seed of the inputs.")
@click.option(
    "--jobs", type=int, default=len(os.sched_getaffinity(0)), help="Processes. Default: one per core."
)
def main(names: tuple[str, ...], sms: tuple[str, ...], match: str, seed: int, jobs: int) -> None:
    """Emulate the kernels; the exit status is 1 if a case fails."""
    planned = {
        (case, sm): launched(case, sm)
        for sm in map(int, sms or SMS)
        for case in cases(sm)
        if case.op in (names or DTYPES) and match in case.title
    }
    if not planned:
        raise click.ClickException("no case matches")
    results = run_all(planned, jobs, seed)
    print_counts(results)
    failed = [result for result in results if result.failure]
    for result in failed:
        click.echo(f"FAIL SM {result.sm}, {result.case.title}: {result.failure}")
    keys = {key for keys in planned.values() for key in keys}
    total = sum(num_variants(op, sm) for op, sm in {(op, sm) for op, sm, _ in keys})
    click.echo(
        f"{len(results) - len(failed)} of {len(results)} cases pass; {len(keys)} of {total} variants executed"
    )
    sys.exit(1 if failed else 0)


if __name__ == "__main__":
    main()
