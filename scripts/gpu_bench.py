"""Times the kernels on a GPU and compares them with the roofline and other kernels: `python scripts/gpu_bench.py`.

A call is the launches of `run`, replayed in place from a CUDA graph that cycles through sets of inputs which are
together larger than the L2 cache. Its time is the median of many replays after a warm-up. The roofline's rates and
the other kernels are measured in the same run. `--interpret` runs toy sizes on a CPU, in Triton's interpreter, whose
times are meaningless.
"""

from __future__ import annotations

import json
import math
import random
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import click
import torch
from gpu_check import chosen_device, device_facts, same_bits
from op_cases import DTYPES, FP8, NANO, SUPER, TOY, Case, decode, interpreting, kernels, prefill
from peers import Peer, PeerMissing, peers
from rich.console import Console
from rich.markup import escape
from rich.table import Table
from roofline import Rates, measure_rates, median_seconds
from torch import Tensor
from triton.errors import TritonError
from triton.runtime.jit import KernelInterface

from nemotrt.plugins.variant import device_sm, supports_fp8

REPLAYS = 50
MAX_SETS = 8
AGREEMENT = 0.05
"""The maximum relative L2 difference of a peer's output from ours, to make sure that it does the same work."""


@dataclass
class Timing:
    """The time of one case, in seconds per call, and those of its peers or why there are none."""

    case: str
    seconds: float
    launches: int
    gigabytes_per_second: float
    teraflops: float
    bound_seconds: float
    share_of_roofline: float
    peers: dict[str, float | str] = field(default_factory=dict)


@dataclass
class Failure:
    """A case that could not be timed, and the reason."""

    case: str
    failure: str


@contextmanager
def recorded(launches: list[Callable[[], object]]) -> Iterator[None]:
    """A context that appends every Triton launch to the list, so that it can be repeated on the same tensors."""
    original = KernelInterface.__getitem__

    def getitem(self: Any, grid: Any) -> Callable[..., object]:
        launch = original(self, grid)

        def first(*arguments: Any, **named: Any) -> object:
            launches.append(lambda: launch(*arguments, **named))
            return launch(*arguments, **named)

        return first

    KernelInterface.__getitem__ = getitem
    try:
        yield
    finally:
        KernelInterface.__getitem__ = original


@dataclass
class Prepared:
    """One set of inputs that was run once; `call` is timed, and works in place on `outputs`."""

    inputs: dict[str, Tensor]
    outputs: tuple[Tensor, ...]
    launches: list[Callable[[], object]]

    def call(self) -> None:
        """Repeat every launch."""
        for launch in self.launches:
            launch()


def prepared(case: Case, inputs: list[Tensor], interpret: bool) -> Prepared:
    """The launches of `run` on these inputs, and its outputs.

    Raises RuntimeError if repeating them gives other outputs, because `run` then does other work than launches.
    """
    spec = case.spec
    launches: list[Callable[[], object]] = []
    with recorded(launches):
        outputs = kernels(case.op, interpret).run(*inputs, **case.attributes())
    named = {declared.name: tensor for declared, tensor in zip(spec.inputs, inputs, strict=True)}
    result = Prepared(named, outputs, launches)
    first = [output.clone() for output in outputs]
    for i, output in enumerate(outputs):
        output.copy_(inputs[spec.pools[i]]) if i in spec.pools else output.fill_(torch.nan)
    result.call()
    for i, (before, after) in enumerate(zip(first, outputs, strict=True)):
        skipped = 1 if i in spec.pools else 0  # the scratch row
        if not launches or not same_bits(before[skipped:], after[skipped:]):
            raise RuntimeError("repeating the launches gives other outputs, so they cannot be timed alone")
    return result


def input_sets(case: Case, device: torch.device, seed: int) -> Iterator[list[Tensor]]:
    """Sets of inputs that fill the L2 cache twice, at least two; the experts' weights are shared by all sets."""
    first = case.inputs(device, seed)
    shared = [i for i, declared in enumerate(case.spec.inputs) if declared.axes[0] == "E"]
    set_bytes = sum(tensor.nbytes for i, tensor in enumerate(first) if i not in shared)
    cache = torch.cuda.get_device_properties(device).L2_cache_size if device.type == "cuda" else 0
    yield first
    for number in range(1, max(2, min(MAX_SETS, math.ceil(2 * cache / set_bytes)))):
        inputs = case.inputs(device, seed + number)
        for i in shared:
            inputs[i] = first[i]
        yield inputs


def seconds_a_call(calls: Sequence[Callable[[], object]], device: torch.device) -> float:
    """The median time of a call; on a GPU, from a CUDA graph that repeats all of them."""
    if device.type != "cuda":
        return median_seconds(lambda: [call() for call in calls], 1, device) / len(calls)
    stream = torch.cuda.Stream()  # type: ignore[no-untyped-call]
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for call in calls:
            call()
    torch.cuda.current_stream().wait_stream(stream)
    rounds = max(1, MAX_SETS // len(calls))
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for call in [*calls] * rounds:
            call()
    return median_seconds(graph.replay, REPLAYS, device) / (rounds * len(calls))


def time_peer(peer: Peer, case: Case, sets: Sequence[Prepared], device: torch.device) -> float | str:
    """A peer's seconds per call, or the reason why there are none."""
    try:
        calls = [peer.prepare(case, one.inputs, one.outputs) for one in sets]
        ours, theirs = sets[0].outputs[0].double().flatten(), calls[0]().double().flatten()
        error = float((theirs - ours).norm() / ours.norm())
        if not error <= AGREEMENT:
            return f"its output differs from ours: relative L2 {error:.1e}"
        return seconds_a_call(calls, device)
    except PeerMissing as error:
        return f"missing: {error}"
    except (RuntimeError, ValueError, TypeError, AttributeError, TritonError) as error:
        return f"failed: {type(error).__name__}: {str(error).strip().splitlines()[0]}"


def time_case(case: Case, rates: Rates, device: torch.device, seed: int) -> Timing:
    """Our time, its fraction of the roofline, and the peers' times."""
    interpret = device.type != "cuda"
    all_inputs = list(input_sets(case, device, seed))
    count = case.count(all_inputs[0])
    sets = [prepared(case, inputs, interpret) for inputs in all_inputs]
    timed = {peer.name: time_peer(peer, case, sets, device) for peer in peers(case, interpret)}
    seconds = seconds_a_call([one.call for one in sets], device)
    bound = count.bound(rates.peak(case.compute_dtype), rates.bandwidth)
    return Timing(
        case=case.title,
        seconds=seconds,
        launches=len(sets[0].launches),
        gigabytes_per_second=count.num_bytes / seconds / 1e9,
        teraflops=count.flops / seconds / 1e12,
        bound_seconds=bound,
        share_of_roofline=bound / seconds,
        peers=timed,
    )


def chosen_cases(interpret: bool, sm: int) -> Iterator[Case]:
    """The cases that are timed: BF16, also with FP8 weights and caches if the SM supports them, and FP16 states."""
    models = (TOY,) if interpret else (SUPER, NANO)
    steps = TOY_TIMED if interpret else FULL_TIMED
    for model in models:
        for op, variants in TIMED_DTYPES.items():
            for dtypes in variants if op != "paged_attention" or model is not NANO else ():
                for step in steps:
                    if FP8 not in dtypes.values() or supports_fp8(sm):
                        yield Case(op, model, step, (("X", "bfloat16"), *dtypes.items()))


FULL_TIMED = (prefill(8192), *(decode(sequences, 8191) for sequences in (1, 16, 64, 256)))
TOY_TIMED = (prefill(24), decode(2, 70))
TIMED_DTYPES: dict[str, tuple[dict[str, str], ...]] = {
    "causal_conv1d": ({},),
    "selective_scan": ({"STATE": "float32"}, {"STATE": "float16"}),
    "moe_dispatch": ({"W": "bfloat16"}, {"W": FP8}),
    "paged_attention": ({"CACHE": "bfloat16"}, {"CACHE": FP8}),
}


def as_table(timings: Sequence[Timing | Failure]) -> Table:
    """A table with a row for each case, followed by its peers."""
    table = Table(box=None, header_style="bold", pad_edge=False)
    table.add_column("case, peer", overflow="fold")
    for name in ("µs", "GB/s", "TFLOP/s", "bound µs", "of roofline", "peer / ours"):
        table.add_column(name, justify="right")
    for timing in timings:
        if isinstance(timing, Failure):
            table.add_row(escape(timing.case), f"[red]{escape(timing.failure)}")
            continue
        share = f"{timing.share_of_roofline:.0%}"
        figures = (timing.gigabytes_per_second, timing.teraflops, timing.bound_seconds * 1e6)
        table.add_row(
            escape(timing.case), f"{timing.seconds * 1e6:.1f}", *(f"{value:.1f}" for value in figures), share
        )
        for name, found in timing.peers.items():
            if isinstance(found, str):
                table.add_row(escape(f"  {name}: {found}"), style="dim")
            else:
                ratio = f"{found / timing.seconds:.2f}"
                table.add_row(f"  {name}", f"{found * 1e6:.1f}", "", "", "", "", ratio, style="dim")
    return table


def time_all(cases: Sequence[Case], rates: Rates, device: torch.device, seed: int) -> list[Timing | Failure]:
    """The timing of each case, or its failure."""
    timings: list[Timing | Failure] = []
    for number, case in enumerate(cases):
        try:
            timings.append(time_case(case, rates, device, seed + MAX_SETS * number))
        except (RuntimeError, ValueError, TritonError) as error:
            reason = f"{type(error).__name__}: {str(error).strip().splitlines()[0]}"
            timings.append(Failure(case.title, reason))
        if device.type == "cuda":
            torch.cuda.empty_cache()
        click.echo(f"{number + 1}/{len(cases)} {case.title}", err=True)
    return timings


@click.command()
@click.option("--op", "names", multiple=True, type=click.Choice(list(DTYPES)), help="Only these ops.")
@click.option(
    "--match", default="", help="Only cases whose title contains this, such as Super, decode 64 or W float8."
)
@click.option("--interpret", is_flag=True, help="Run toy sizes on a CPU, in Triton's interpreter.")
@click.option(
    "--output", type=click.Path(path_type=Path), default=Path("build/gpu_bench.json"), show_default=True
)
def main(names: tuple[str, ...], match: str, interpret: bool, output: Path) -> None:
    """Compare the kernels' times with the roofline and with peers; the exit status is 1 if one of ours fails."""
    device = chosen_device(interpret)
    sm = 90 if interpret else device_sm(device)
    cases = [
        case for case in chosen_cases(interpret, sm) if match in case.title and case.op in (names or DTYPES)
    ]
    if not cases:
        raise click.ClickException("no case matches")
    seed = random.randrange(2**31)
    rates = measure_rates(device)
    with torch.inference_mode(), interpreting(interpret):
        timings = time_all(cases, rates, device, seed)
    facts = device_facts(device, seed)
    output.parent.mkdir(parents=True, exist_ok=True)
    content = {**facts, "rates": asdict(rates), "results": [asdict(timing) for timing in timings]}
    output.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")

    Console(width=None if sys.stdout.isatty() else 160).print(as_table(timings))
    measured = ", ".join(f"{dtype} {flops / 1e12:.0f} TFLOP/s" for dtype, flops in rates.flops.items())
    note = "; the interpreter's times are meaningless" if interpret else ""
    click.echo(f"{facts['device']}: copy {rates.bandwidth / 1e12:.2f} TB/s, {measured}; {output}{note}")
    sys.exit(any(isinstance(timing, Failure) for timing in timings))


if __name__ == "__main__":
    main()
