"""What inspect, check and validate found, as tables for a person; `show` prints them on stdout."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Mapping

from rich import box
from rich.console import Console, RenderableType
from rich.table import Table
from rich.text import Text

from nemotrt.exporter.checkpoint.layer_selection import partial_model
from nemotrt.exporter.commands.bisection_table import bisection
from nemotrt.exporter.pipelines.check import Check
from nemotrt.exporter.pipelines.inspect import Graph, Inspection, Part
from nemotrt.exporter.report.gate_summary import summary
from nemotrt.exporter.report.model import TextReport, ValidationReport
from nemotrt.exporter.report.units import count, duration, size
from nemotrt.exporter.runtime.manifest import Manifest
from nemotrt.model.config_fields import PATTERN

WIDTH = 100
"""Columns where stdout is no terminal."""

SYMBOLS = {kind: character for character, kind in PATTERN.items()}
COLOURS = {"mamba": "cyan", "attention": "yellow", "moe": "magenta", "mlp": "green"}

SHORT = {
    "float64": "FP64",
    "float32": "FP32",
    "float16": "FP16",
    "bfloat16": "BF16",
    "float8_e4m3fn": "FP8",
    "float8_e5m2": "FP8 (E5M2)",
}
"""A dtype → what tables call it."""


def show(items: Iterable[RenderableType]) -> None:
    """Print one below the other."""
    # Markup would take the extra of nemo-export[cpu] for a style.
    console = Console(highlight=False, markup=False, width=None if sys.stdout.isatty() else WIDTH)
    for item in items:
        console.print(item)


def inspection(found: Inspection) -> list[RenderableType]:
    """A title, the layers by kind, and what else a checkpoint, a graph or a bundle has to show."""
    parameters = sum(part.num_parameters for part in found.parts if part.kind not in ("mtp", "other"))
    stored = sum(part.bytes for part in found.parts)
    title = Text.assemble(
        (found.path, "bold"), f"   {found.what}, {count(parameters)} parameters, {size(stored)}"
    )
    shown: list[RenderableType] = [title]
    if found.manifest:
        shown.append(_bundle(found.manifest))
    if found.layers:
        shown += ["", _pattern(found.layers, found.layer)]
    shown += ["", parts(found.parts), "", _state(found.parts)]
    if found.layer is not None:
        shown += ["", *_layer(found)]
    else:
        shown += _graph(found.graph) if found.graph else []
        shown += ["", _files(found.manifest)] if found.manifest else []
        shown += ["", _inert(found.inert)] if found.inert else []
    return shown


def _table(*columns: str, right: tuple[str, ...] = (), title: str = "") -> Table:
    table = Table(
        box=box.SIMPLE_HEAD, pad_edge=False, show_edge=False, title=title or None, title_justify="left"
    )
    for column in columns:
        table.add_column(column, justify="right" if column in right else "left", overflow="fold")
    return table


def _pattern(layers: Mapping[int, str], marked: int | None = None) -> RenderableType:
    """The layers as their pattern's characters, and what those stand for."""
    text = Text("layers   ")
    for index, kind in layers.items():
        style = COLOURS[kind] + (" reverse" if index == marked else "")
        text.append(SYMBOLS[kind], style)
    kinds = ", ".join(f"{SYMBOLS[kind]} {kind}" for kind in dict.fromkeys(layers.values()))
    return text.append(f"   {len(layers)}: {kinds}", "dim")


def parts(found: tuple[Part, ...]) -> Table:
    """The layers by kind: how many, how large, in what precision."""
    table = _table(
        "part",
        "layers",
        "tensors",
        "parameters",
        "bytes",
        "stored as",
        right=("layers", "tensors", "parameters", "bytes"),
    )
    for part in found:
        table.add_row(
            Text(part.kind, COLOURS.get(part.kind, "")),
            str(part.num_layers or ""),
            f"{part.num_tensors:,}",
            count(part.num_parameters),
            size(part.bytes),
            ", ".join(_share(dtype, held, part.bytes) for dtype, held in part.bytes_by_dtype.items()),
        )
    return table


def _share(dtype: str, held: int, whole: int) -> str:
    percent = 100 * held / whole
    shown = "" if percent > 99.9 else " <0.1%" if percent < 0.1 else f" {percent:.3g}%"
    return SHORT.get(dtype, dtype) + shown


def _state(found: tuple[Part, ...]) -> str:
    state, cache = sum(p.state_bytes for p in found), sum(p.cache_bytes_per_token for p in found)
    return f"a sequence holds {size(state)} of state, and {size(cache)} of KV cache a token"


def _bundle(manifest: Manifest) -> RenderableType:
    verdict = manifest.validation
    colour = {"passed": "green", "failed": "red"}.get(verdict.verdict, "yellow")
    proof = f"{verdict.num_gates - verdict.num_failed} of {verdict.num_gates} gates, {verdict.runs_as}"
    grid = Table.grid(padding=(0, 2))
    grid.add_row("id", manifest.bundle_id)
    grid.add_row("from", f"{manifest.source.name}, license {manifest.license}")
    grid.add_row("precision", manifest.model.precision)
    if manifest.partial:
        grid.add_row("partial", Text(partial_model(manifest.model.chosen_layers), "yellow"))
    grid.add_row("proof", Text.assemble((verdict.verdict, colour), f": {proof}" if verdict.num_gates else ""))
    for profile in manifest.profiles:
        grid.add_row(
            profile.runtime,
            f"{profile.path}: {profile.max_tokens} tokens and {profile.max_sequences} sequences a step,"
            f" {profile.max_context} tokens a sequence, {profile.page_size} a page",
        )
    return grid


def _graph(graph: Graph) -> list[RenderableType]:
    table = _table(
        "operator",
        "nodes",
        "operator ",
        "nodes ",
        "operator  ",
        "nodes  ",
        right=("nodes", "nodes ", "nodes  "),
    )
    entries = [(name, str(number)) for name, number in graph.ops.items()]
    rows = -(-len(entries) // 3)
    for row in range(rows):
        cells = [cell for entry in entries[row::rows] for cell in entry]
        table.add_row(*cells)
    opsets = ", ".join(f"{domain} {version}" for domain, version in graph.opsets.items())
    bodies = ", ".join(f"{name} ({nodes} nodes)" for name, nodes in graph.functions.items())
    return [
        "",
        table,
        "",
        f"{graph.num_nodes} nodes, opset {opsets}" + (f"; bodies: {bodies}" if bodies else ""),
    ]


def _files(manifest: Manifest) -> Table:
    table = _table("file", "role", "bytes", "sha256", right=("bytes",))
    for file in manifest.files:
        table.add_row(file.path, file.role, f"{file.size:,}", file.sha256[:16])
    return table


def _inert(fields: dict[str, str]) -> Table:
    table = _table("field that changes nothing", "because")
    for name, reason in fields.items():
        table.add_row(name, reason)
    return table


def _layer(found: Inspection) -> list[RenderableType]:
    assert found.layer is not None
    table = _table(
        "tensor", "dtype", "shape", "bytes", "file", right=("bytes",), title=f"layer {found.layer}"
    )
    for weight in found.weights:
        shape = " × ".join(str(length) for length in weight.shape) or "scalar"
        table.add_row(
            weight.name, SHORT.get(weight.dtype, weight.dtype), shape, f"{weight.bytes:,}", weight.file
        )
    if not found.nodes:
        return [table]
    nodes = _table("node", "operator")
    for node in found.nodes:
        nodes.add_row(node.name, node.op)
    return [table, "", nodes]


def check(found: Check) -> list[RenderableType]:
    """The verdict first, then what is understood, what is built, and what it needs."""
    verdict = ("can be built", "green") if found.is_buildable else ("cannot be built", "red")
    active = ""
    if found.num_active_parameters != found.num_parameters:
        active = f", {count(found.num_active_parameters)} active"
    summary = f"   {count(found.num_parameters)} parameters{active}, {found.num_tensors:,} tensors"
    shown: list[RenderableType] = [Text.assemble((found.name, "bold"), "   ", verdict, summary)]
    for problem in found.problems[:MAX_PROBLEMS]:
        shown.append(
            Text.assemble(
                ("✗ ", "red"), problem.message, (f"\n  {problem.hint}" if problem.hint else "", "dim")
            )
        )
    if len(found.problems) > MAX_PROBLEMS:
        shown.append(f"  and {len(found.problems) - MAX_PROBLEMS} more problems (--json has all)")
    shown += [Text.assemble(("! ", "yellow"), note) for note in found.notes]
    shown += ["", _pattern(found.layers), "", parts(found.parts), "", _state(found.parts)]
    shown += ["", _dtypes(found), "", _runtimes(found), "", _tools(found), "", _estimates(found)]
    return [*shown, "", _inert(found.inert)] if found.inert else shown


MAX_PROBLEMS = 10


def _dtypes(found: Check) -> Table:
    table = _table("as built", "dtype", "parameters and state")
    for kind, by_dtype in found.dtypes.items():
        for number, (dtype, names) in enumerate(by_dtype.items()):
            table.add_row(Text("" if number else kind, COLOURS.get(kind, "")), SHORT[dtype], ", ".join(names))
    return table


def _runtimes(found: Check) -> Table:
    table = _table("runtime", "built", "how, or why not")
    for runtime in found.runtimes:
        table.add_row(runtime.name, "yes" if runtime.is_built else "no", runtime.why)
    return table


def _tools(found: Check) -> Table:
    table = _table("package", "here", "for", "how to get it")
    for tool in found.tools:
        table.add_row(
            tool.package, tool.version or "missing", tool.needed_for, "" if tool.version else tool.get
        )
    return table


def _estimates(found: Check) -> Table:
    table = _table("stage", "memory", "writes", "CPU time", right=("memory", "writes", "CPU time"))
    for stage in found.estimates:
        written = size(stage.disk_bytes) if stage.disk_bytes else ""
        name = f"{stage.stage} ({stage.runtime})" if stage.runtime else stage.stage
        table.add_row(name, f"~{size(stage.memory_bytes)}", written, f"~{duration(stage.cpu_seconds)}")
    here = f"{size(found.memory_bytes)} here"
    table.add_row("", here, f"{size(found.disk_free_bytes)} free", f"{found.num_cores} cores", style="dim")
    return table


def report(found: ValidationReport) -> list[RenderableType]:
    """Each scenario's metrics: how many gates, and the one nearest to its limit or furthest beyond it."""
    table = _table(
        "scenario", "metric", "gates", "worst", "limit", "of", "", right=("gates", "worst", "limit")
    )

    before = ""
    for row in summary(found.gates):
        worst = row.worst
        verdict = Text(f"{row.failed} failed", "red") if row.failed else Text("passed", "green")
        table.add_row(
            "" if row.scenario == before else row.scenario,
            row.metric,
            str(row.count),
            f"{worst.value:.3g}",
            f"{worst.limit:.3g}",
            worst.output,
            verdict,
        )
        before = row.scenario
    passed = sum(gate.passed for gate in found.gates)
    colour = "red" if not found.passed else "green" if found.is_whole else "yellow"
    outcome = (found.verdict, colour)
    line = f": {passed} of {len(found.gates)} gates; {found.candidate} against {found.reference}"
    shown: list[RenderableType] = [table, "", Text.assemble(outcome, line)]
    mismatches = sum(found.routing_mismatches.values())
    if mismatches:
        shown.append(Text(f"near ties: {mismatches} routing mismatches; compared on the same experts"))
    shown += _text(found.text) if found.text else []
    shown += ["", *bisection(found.bisect)] if found.bisect else []
    return shown + [Text(f"not compared: {what}", "dim") for what in found.not_compared]


def _text(found: TextReport) -> list[RenderableType]:
    """What was built on text, what quantization costs, and which layers it costs most in."""
    title = f"{found.num_tokens:,} tokens of {found.text}" + (f", before: {found.base}" if found.base else "")
    figures = _table(title, "mean KL", "same best token", "perplexity ratio")
    for figure in found.comparisons:
        figures.add_row(
            figure.name,
            f"{figure.mean_kl:.2e} ± {figure.mean_kl_error:.0e}",
            f"{100 * figure.top1_agreement:.2f}% ± {100 * figure.top1_agreement_error:.2f}%",
            f"{figure.perplexity_ratio:.5f} ± {figure.perplexity_ratio_error:.5f}",
        )
    if not found.layers:
        return ["", figures]
    layers = _table("layer", "kind", "mean KL, this layer alone quantized", right=("layer",))
    for cost in found.layers[:MAX_LAYERS]:
        kind = Text(cost.kind, COLOURS.get(cost.kind, ""))
        layers.add_row(cost.name, kind, f"{cost.mean_kl:.2e} ± {cost.mean_kl_error:.0e}")
    advice = "--exclude '*.layers.N.mixer' leaves layer N unquantized"
    return ["", figures, "", layers, Text(advice, "dim")]


MAX_LAYERS = 10
