"""Checks the kernels on a GPU against the reference, at the models' full width: `python scripts/gpu_check.py`.

It runs every op × dtype × step of `op_cases` with random inputs. An output passes if it is finite, close to the
reference in FP64 (in FP32 for FP8 weights, because the hidden activation is rounded to x's dtype), zero in padding,
and bitwise equal in two runs, the first of which starts with memory full of NaN.
`--plugins` checks the plugin library, as an engine calls it, instead of the Triton source. `--interpret` runs toy
sizes on a CPU in Triton's interpreter; with a library, it checks everything up to the launch.
"""

from __future__ import annotations

import json
import math
import random
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

import click
import torch
from op_cases import DTYPES, FP8, FULL_STEPS, NANO, SUPER, TOY, TOY_STEPS, Case, cases, kernels
from rich.console import Console
from rich.markup import escape
from rich.table import Table
from torch import Tensor
from triton.errors import TritonError

from nemotrt.plugins import build, link
from nemotrt.plugins.contract import DType
from nemotrt.plugins.kernel_index import KernelError
from nemotrt.plugins.library import PluginError, PluginLibrary, TensorShape, is_shipped, shipped_library
from nemotrt.plugins.spec import OpSpec
from nemotrt.plugins.variant import device_sm, supports_fp8

WORST_ROW = 5
"""The tolerance of a single token or pool row, as a multiple: errors of few values vary more."""

Outputs = tuple[Tensor, ...]
Errors = tuple[float, float]
Run = Callable[..., Outputs]


@dataclass(frozen=True)
class Result:
    """The result of one case; `failure` is empty if it passed."""

    case: str
    error: float
    """Maximum relative L2 error of an output."""
    worst_row: float
    """Maximum relative L2 error of a token or pool row."""
    tolerance: float
    seconds: float
    failure: str
    not_run: str = ""
    """Why nothing was compared, if the case was only checked up to the launch."""


class CheckFailed(Exception):  # noqa: N818 - not an error in the program
    """An output is wrong; the message is one line."""


def bits(tensor: Tensor) -> Tensor:
    """The tensor's bits as integers, so that NaN can be compared."""
    return tensor.contiguous().view({1: torch.int8, 2: torch.int16, 4: torch.int32}[tensor.element_size()])


def same_bits(left: Tensor, right: Tensor) -> bool:
    """Whether two tensors are bitwise equal."""
    return torch.equal(bits(left), bits(right))


@contextmanager
def poisoned_memory() -> Iterator[None]:
    """A context in which new tensors are full of NaN, or of the largest integer."""
    torch.use_deterministic_algorithms(True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(False)


def expected(case: Case, inputs: list[Tensor]) -> tuple[Tensor, ...]:
    """The reference's outputs, computed in FP64; in FP32 for FP8 weights."""
    wide = case.dtype.get("W") != FP8
    raised = [
        tensor.double() if wide and declared.dtype == "X" else tensor
        for declared, tensor in zip(case.spec.inputs, inputs, strict=True)
    ]
    return case.spec.reference()(*raised, **case.attributes())


def error_of(actual: Tensor, reference: Tensor) -> Errors:
    """The relative L2 error, and the maximum over rows, relative to the larger of the row's norm and the RMS norm."""
    reference = reference.double().flatten(1)
    difference = (actual.double().flatten(1) - reference).norm(dim=1)
    norms = reference.norm(dim=1)
    usual = norms.square().mean().sqrt()
    if not usual > 0:
        raise CheckFailed("the reference is zero: nothing was compared")
    relative = difference / torch.maximum(norms, usual)
    return float(difference.norm() / norms.norm()), float(relative.max())


def check_tokens(case: Case, actual: Tensor, reference: Tensor) -> Errors:
    """The errors of an output by token; raises CheckFailed if it is not finite, or if padding is not zero."""
    used = case.step.num_tokens if case.op == "moe_dispatch" else sum(case.step.lengths)
    if not actual.isfinite().all():
        raise CheckFailed(f"{int((~actual.isfinite()).sum())} values are not finite")
    if actual[used:].any():
        raise CheckFailed("padding tokens are not zero")
    return error_of(actual[:used], reference[:used])


def check_pool(
    case: Case, inputs: dict[str, Tensor], before: Tensor, actual: Tensor, reference: Tensor
) -> Errors:
    """The errors of a pool without its scratch row; raises CheckFailed if rows that must be equal differ.

    A convolution's history and a cache contain copies, which must be bitwise equal to the reference. The recurrent
    states of sequences with tokens must be close to the reference, and the others unchanged.
    """
    if case.op != "selective_scan":
        if not same_bits(actual[1:], reference[1:].to(actual.dtype)):
            raise CheckFailed("the pool's bits are not the reference's")
        return 0.0, 0.0
    starts, slots = inputs["query_start"].long(), inputs["slot"].long()
    used = slots[starts[1:] > starts[:-1]]
    unused = torch.ones(len(actual), dtype=torch.bool, device=actual.device)
    unused[0] = unused[used] = False
    if not same_bits(actual[unused], before[unused]):
        raise CheckFailed("the state of a sequence without tokens changed")
    if not actual[used].isfinite().all():
        raise CheckFailed("a state is not finite")
    return error_of(actual[used], reference[used])


def compare(case: Case, inputs: list[Tensor], first: Outputs, second: Outputs) -> Errors:
    """The maximum errors over all outputs; raises CheckFailed on the first wrong output."""
    spec, reference = case.spec, expected(case, inputs)
    named = {declared.name: tensor for declared, tensor in zip(spec.inputs, inputs, strict=True)}
    worst = (0.0, 0.0)
    for i, declared in enumerate(spec.outputs):
        skipped = 1 if i in spec.pools else 0
        try:
            if i in spec.pools:
                errors = check_pool(case, named, inputs[spec.pools[i]], first[i], reference[i])
            else:
                errors = check_tokens(case, first[i], reference[i])
            if not same_bits(first[i][skipped:], second[i][skipped:]):
                raise CheckFailed("two runs gave different bits")
        except CheckFailed as error:
            raise CheckFailed(f"{declared.name}: {error}") from None
        worst = max(worst[0], errors[0]), max(worst[1], errors[1])
    return worst


def check(case: Case, run: Run, device: torch.device, seed: int) -> Result:
    """Run a case twice and compare; errors are reported in the result."""
    started = time.perf_counter()
    tolerance = max(case.spec.tolerances[dtype].relative_l2 for dtype in case.dtype.values())
    errors, failure = (math.nan, math.nan), ""
    try:
        inputs = case.inputs(device, seed)
        with poisoned_memory():
            first = run(*inputs, **case.attributes())
        second = run(*inputs, **case.attributes())
        errors = compare(case, inputs, first, second)
        if not errors[0] <= tolerance:
            failure = "the error is beyond the tolerance"
        elif not errors[1] <= WORST_ROW * tolerance:
            failure = f"a row's error is beyond {WORST_ROW} times the tolerance"
    except (CheckFailed, RuntimeError, ValueError, TritonError) as error:
        failure = f"{type(error).__name__}: {str(error).strip().splitlines()[0]}"
    return Result(case.title, *errors, tolerance, time.perf_counter() - started, failure)


def check_up_to_launch(case: Case, library: PluginLibrary, sm: int, seed: int) -> Result:
    """Check without a GPU that a plugin's outputs have the reference's shapes, and that it has kernels for the SM."""
    started = time.perf_counter()
    failure, not_run = "", ""
    try:
        inputs = case.inputs(torch.device("cpu"), seed)
        plugin = library.plugin(case.spec, case.attributes())
        shapes = plugin.shape([_described(tensor) for tensor in inputs])
        reference = tuple(map(_described, case.spec.reference()(*inputs, **case.attributes())))
        if shapes.outputs != reference:
            raise CheckFailed(f"the plugin's outputs are {shapes.outputs}, expected {reference}")
        not_run = f"{len(plugin.launches(sm))} launches for SM {sm} found, none executed: there is no GPU"
    except (CheckFailed, PluginError) as error:
        failure = f"{type(error).__name__}: {error}"
    seconds = time.perf_counter() - started
    return Result(case.title, math.nan, math.nan, math.nan, seconds, failure, not_run)


def _described(tensor: Tensor) -> TensorShape:
    return DType.from_torch(tensor.dtype), tuple(tensor.shape)


def chosen_cases(full: bool, sm: int) -> Iterator[Case]:
    """Nano's and Super's cases, or toy ones; FP8 if the SM supports it; attention only once, since it is equal."""
    if not full:
        yield from cases(TOY, TOY_STEPS)
        return
    for model in (NANO, SUPER):
        for case in cases(model, FULL_STEPS):
            is_duplicate = case.op == "paged_attention" and model is SUPER
            if not is_duplicate and (supports_fp8(sm) or not case.needs_fp8):
                yield case


def device_facts(device: torch.device, seed: int) -> dict[str, Any]:
    """The device, the seed and the versions of a result."""
    packages = {name: version(name) for name in ("torch", "triton")}
    if device.type != "cuda":
        return {"device": "Triton's interpreter on a CPU", "seed": seed, **packages}
    properties = torch.cuda.get_device_properties(device)
    return {
        "device": properties.name,
        "sm": device_sm(device),
        "cuda": torch.version.cuda,
        "seed": seed,
        **packages,
    }


def chosen_device(interpret: bool) -> torch.device:
    """The GPU, or the CPU for the interpreter; raises ClickException if there is no GPU."""
    if interpret:
        return torch.device("cpu")
    if not torch.cuda.is_available():
        raise click.ClickException("there is no CUDA GPU: --interpret checks toy sizes on a CPU")
    return torch.device("cuda")


def run_plugin(
    library: PluginLibrary, spec: OpSpec, *tensors: Tensor, **attributes: int | float
) -> tuple[Tensor, ...]:
    """Run an op's plugin like its reference: inputs in SPEC order → outputs and new pools.

    All tensors are on one device, whose context is current. Raises PluginError if the plugin fails.
    """
    inputs = [tensor.contiguous() for tensor in tensors]
    plugin = library.plugin(spec, attributes)
    shapes = plugin.shape([(DType.from_torch(tensor.dtype), tuple(tensor.shape)) for tensor in inputs])
    outputs = []
    for (dtype, sizes), alias in zip(shapes.outputs, shapes.aliases, strict=True):
        if alias >= 0:
            inputs[alias] = inputs[alias].clone()
            outputs.append(inputs[alias])
        else:
            outputs.append(torch.empty(sizes, dtype=DType(dtype).torch, device=inputs[0].device))
    workspace = torch.empty(shapes.workspace_bytes, dtype=torch.uint8, device=inputs[0].device)
    is_gpu = inputs[0].is_cuda
    stream = torch.cuda.current_stream(inputs[0].device).cuda_stream if is_gpu else 0
    plugin.enqueue(
        [tensor.data_ptr() for tensor in inputs],
        [tensor.data_ptr() for tensor in outputs],
        workspace.data_ptr(),
        stream,
    )
    if is_gpu:  # the workspace must outlive the launches
        torch.cuda.current_stream(inputs[0].device).synchronize()
    return tuple(outputs)


def plugin_library(sm: int, path: Path | None = None) -> PluginLibrary:
    """The library at the path, or the installed one, or a new one with every kernel for this SM."""
    try:
        if path is not None:
            return PluginLibrary(path)
        if is_shipped():
            return shipped_library()
        folder = Path("build/gpu-check")
        index = build.build(folder / "kernels", (sm,))
        return PluginLibrary(link.link(index, folder))
    except (KernelError, PluginError) as error:
        raise click.ClickException(str(error)) from None


def as_table(results: Sequence[Result]) -> Table:
    """A table with one row per case."""
    table = Table(box=None, header_style="bold", pad_edge=False)
    table.add_column("case", overflow="fold")
    for name in ("relative L2", "max. row", "tolerance", "s"):
        table.add_column(name, justify="right")
    table.add_column("")
    for result in results:
        errors = (
            "–" if value != value else f"{value:.1e}"
            for value in (result.error, result.worst_row, result.tolerance)
        )
        verdict = f"[yellow]{escape(result.not_run)}" if result.not_run else "[green]pass"
        if result.failure:
            verdict = f"[red]FAIL: {escape(result.failure)}"
        table.add_row(escape(result.case), *errors, f"{result.seconds:.1f}", verdict)
    return table


@click.command()
@click.option("--op", "names", multiple=True, type=click.Choice(list(DTYPES)), help="Only these ops.")
@click.option(
    "--match", default="", help="Only cases whose title contains this, such as Super, decode 64 or W float8."
)
@click.option("--interpret", is_flag=True, help="Run toy sizes on a CPU, in Triton's interpreter.")
@click.option("--plugins", is_flag=True, help="Run the plugin library: the installed one, or a new one.")
@click.option(
    "--library", "path", type=click.Path(path_type=Path, exists=True), help="Run this plugin library."
)
@click.option("--seed", type=int, help="Random seed of the inputs. Default: random.")
@click.option(
    "--output", type=click.Path(path_type=Path), default=Path("build/gpu_check.json"), show_default=True
)
def main(
    names: tuple[str, ...],
    match: str,
    interpret: bool,
    plugins: bool,
    path: Path | None,
    seed: int | None,
    output: Path,
) -> None:
    """Check the kernels against the reference; the exit status is 1 if a case fails."""
    device = chosen_device(interpret)
    sm = device_sm(device)
    library = plugin_library(sm, path) if plugins or path else None
    if library and interpret:
        sm = max(library.description["sms"])  # any SM that the library has kernels for
    seed = random.randrange(2**31) if seed is None else seed
    picked = [
        case
        for case in chosen_cases(not interpret, sm)
        if match in case.title and case.op in (names or DTYPES)
    ]
    if not picked:
        raise click.ClickException("no case matches")
    torch.set_float32_matmul_precision("highest")
    results = []
    for number, case in enumerate(picked):
        if library and interpret:
            result = check_up_to_launch(case, library, sm, seed + number)
        else:
            run = partial(run_plugin, library, case.spec) if library else kernels(case.op, interpret).run
            result = check(case, run, device, seed + number)
        results.append(result)
        verdict = result.failure or result.not_run or "pass"
        click.echo(f"{number + 1}/{len(picked)} {case.title}: {verdict}", err=True)
    facts = device_facts(device, seed) | ({"library": library.description} if library else {})
    output.parent.mkdir(parents=True, exist_ok=True)
    # JSON has no NaN, so write null.
    rows = [
        {key: None if value != value else value for key, value in asdict(result).items()}
        for result in results
    ]
    text = json.dumps({**facts, "results": rows}, indent=1, allow_nan=False)
    output.write_text(text + "\n", encoding="utf-8")

    Console(width=None if sys.stdout.isatty() else 180).print(as_table(results))
    failed = sum(bool(result.failure) for result in results)
    not_run = sum(bool(result.not_run) for result in results)
    passed = len(results) - failed - not_run
    click.echo(f"{passed} of {len(results)} pass on {facts['device']}, seed {seed}; {output}")
    if not_run:
        click.echo(f"{not_run} were only checked up to the launch: there is no GPU")
    sys.exit(1 if failed else 0)


if __name__ == "__main__":
    main()
