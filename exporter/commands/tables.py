"""The results of inspect, check and validate as tables for a terminal; `show` prints them to stdout."""

import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence

from rich import box
from rich.console import RenderableType
from rich.table import Table
from rich.text import Text

from nemotrt.exporter.checkpoint.layer_selection import partial_model
from nemotrt.exporter.commands.terminal import rich_console
from nemotrt.exporter.pipelines.check import PACKAGES, Check
from nemotrt.exporter.pipelines.inspect import Inspection, Part
from nemotrt.exporter.report.model import (
    Bisection,
    DivergentValue,
    TextComparison,
    TextReport,
    ValidationReport,
)
from nemotrt.exporter.report.units import count, duration, size
from nemotrt.exporter.runtime.manifest import Manifest
from nemotrt.model.config_fields import PATTERN
from nemotrt.plugins.contract import DType

WIDTH = 100
"""Columns of the output when stdout is not a terminal."""
MAX_PROBLEMS = 10
MAX_LAYERS = 10

SYMBOLS = {kind: character for character, kind in PATTERN.items()}
COLORS = {"mamba": "cyan", "attention": "yellow", "moe": "magenta", "mlp": "green"}
CAUSES = ("DIFFERS", "not compared", "shape")
"""Words in the description of a node's input that mark it as a likely cause of a divergence."""

Items = Iterator[RenderableType]


def show(items: Iterable[RenderableType]) -> None:
    """Print the items one below the other."""
    # With markup, rich would read the extra in nemo-export[cpu] as a style.
    console = rich_console(highlight=False, markup=False, width=None if sys.stdout.isatty() else WIDTH)
    for item in items:
        console.print(item)


def _table(columns: Sequence[str], rows: Iterable[Iterable[str | Text]], title: str | None = None) -> Table:
    """A table; columns whose heading starts with > are aligned to the right."""
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, show_edge=False, title=title, title_justify="left")
    for column in columns:
        table.add_column(column.lstrip(">"), justify="right" if column[0] == ">" else "left", overflow="fold")
    for row in rows:
        table.add_row(*row)
    return table


def _kind(kind: str) -> Text:
    return Text(kind, COLORS.get(kind, ""))


def _dtype(name: str) -> str:
    """`BF16`; a dtype that only other tools' graphs have keeps its name."""
    return DType(name).label if name in tuple(DType) else name


def inspection(contents: Inspection) -> Items:
    """The layers by kind, their memory, and the details of a checkpoint, a graph or a bundle."""
    parameters = sum(part.num_parameters for part in contents.parts if part.kind not in ("mtp", "other"))
    stored = sum(part.bytes for part in contents.parts)
    summary = f"   {contents.what}, {count(parameters)} parameters, {size(stored)}"
    yield Text.assemble((contents.path, "bold"), summary)
    if contents.manifest:
        yield _bundle(contents.manifest)
    if contents.layers:
        yield from ("", _pattern(contents.layers, contents.layer))
    yield from ("", *_parts(contents.parts))
    if contents.layer is not None:
        yield from _layer(contents)
        return
    if contents.graph:
        yield from _graph(contents)
    if contents.manifest:
        rows = [
            (file.path, file.role, f"{file.size:,}", file.sha256[:16]) for file in contents.manifest.files
        ]
        yield from ("", _table(["file", "role", ">bytes", "sha256"], rows))
    yield from _inert(contents.inert)


def _pattern(layers: Mapping[int, str], marked: int | None = None) -> Text:
    """The layers as the characters of `hybrid_override_pattern`, with a legend."""
    text = Text("layers   ")
    for index, kind in layers.items():
        text.append(SYMBOLS[kind], COLORS[kind] + (" reverse" if index == marked else ""))
    legend = ", ".join(f"{SYMBOLS[kind]} {kind}" for kind in dict.fromkeys(layers.values()))
    return text.append(f"   {len(layers)}: {legend}", "dim")


def _parts(parts: Sequence[Part]) -> Items:
    table = _table(["part", ">layers", ">tensors", ">parameters", ">size", "dtype"], ())
    for part in parts:
        dtypes = ", ".join(_share(dtype, stored, part.bytes) for dtype, stored in part.bytes_by_dtype.items())
        counts = (str(part.num_layers or ""), f"{part.num_tensors:,}", count(part.num_parameters))
        table.add_row(_kind(part.kind), *counts, size(part.bytes), dtypes)
    yield table
    state, cache = sum(p.state_bytes for p in parts), sum(p.cache_bytes_per_token for p in parts)
    yield ""
    yield f"memory per sequence: {size(state)} of recurrent state, {size(cache)} of KV cache per token"


def _share(dtype: str, stored: int, total: int) -> str:
    percent = 100 * stored / total
    share = "" if percent > 99.9 else " <0.1%" if percent < 0.1 else f" {percent:.3g}%"
    return _dtype(dtype) + share


def _bundle(manifest: Manifest) -> Table:
    validation = manifest.validation
    color = {"passed": "green", "failed": "red"}.get(validation.verdict, "yellow")
    passed = validation.num_gates - validation.num_failed
    gates = f": {passed} of {validation.num_gates} gates, {validation.runs_as}"
    grid = Table.grid(padding=(0, 2))
    grid.add_row("id", manifest.bundle_id)
    grid.add_row("source", f"{manifest.source.name}, license: {manifest.license}")
    grid.add_row("precision", manifest.model.precision)
    grid.add_row(
        "validation", Text.assemble((validation.verdict, color), gates if validation.num_gates else "")
    )
    if manifest.partial:
        grid.add_row("partial", Text(partial_model(manifest.model.chosen_layers), "yellow"))
    if ignored := manifest.model.ignored_fields:
        grid.add_row("ignored", Text(f"{', '.join(ignored)} of config.json", "yellow"))
    if zeros := manifest.model.zero_weights:
        grid.add_row("zeros", Text(zeros, "yellow"))
    for profile in manifest.profiles:
        step = f"{profile.max_tokens} tokens and {profile.max_sequences} sequences per step"
        sequence = f"{profile.max_context} tokens per sequence, {profile.page_size} per page"
        grid.add_row(profile.runtime, f"{profile.path}: {step}, {sequence}")
    return grid


def _graph(contents: Inspection) -> Items:
    operators = list(contents.ops.items())
    num_rows = -(-len(operators) // 3)
    rows = [
        [cell for name, nodes in operators[row::num_rows] for cell in (name, str(nodes))]
        for row in range(num_rows)
    ]
    opsets = ", ".join(f"{domain} {version}" for domain, version in contents.opsets.items())
    functions = ", ".join(f"{name} ({nodes} nodes)" for name, nodes in contents.functions.items())
    yield from ("", _table(["operator", ">nodes"] * 3, rows), "")
    functions = f"; functions: {functions}" if functions else ""
    yield f"{sum(contents.ops.values())} nodes, opset {opsets}{functions}"


def _inert(fields: Mapping[str, str]) -> Items:
    if fields:
        yield from ("", _table(["config field without effect", "reason"], fields.items()))


def _layer(contents: Inspection) -> Items:
    rows = []
    for weight in contents.weights:
        shape = " × ".join(map(str, weight.shape)) or "scalar"
        rows.append((weight.name, _dtype(weight.dtype), shape, f"{weight.bytes:,}", weight.file))
    title = f"layer {contents.layer}"
    yield from ("", _table(["tensor", "dtype", "shape", ">bytes", "file"], rows, title))
    if contents.nodes:
        yield from ("", _table(["node", "operator"], contents.nodes.items()))


def check(result: Check) -> Items:
    """The verdict and the problems, then the model, what a build makes of it, and what the build needs."""
    is_sparse = result.num_active_parameters != result.num_parameters
    active = f", {count(result.num_active_parameters)} active" if is_sparse else ""
    yield Text.assemble(
        (result.name, "bold"),
        "   ",
        ("can be built", "green") if result.is_buildable else ("cannot be built", "red"),
        f"   {count(result.num_parameters)} parameters{active}, {result.num_tensors:,} tensors",
    )
    for problem in result.problems[:MAX_PROBLEMS]:
        hint = f"\n  {problem.hint}" if problem.hint else ""
        yield Text.assemble(("✗ ", "red"), str(problem), (hint, "dim"))
    if len(result.problems) > MAX_PROBLEMS:
        yield f"  and {len(result.problems) - MAX_PROBLEMS} more problems (--json lists all)"
    yield from (Text.assemble(("! ", "yellow"), note) for note in result.notes)
    yield from ("", _pattern(result.layers), "", *_parts(result.parts))
    dtypes = [
        (_kind("" if number else kind), _dtype(dtype), ", ".join(names))
        for kind, by_dtype in result.dtypes.items()
        for number, (dtype, names) in enumerate(by_dtype.items())
    ]
    yield from ("", _table(["in the graph", "dtype", "parameters and state"], dtypes))
    runtimes = [(name, "yes", how) for name, how in result.runtimes.items()]
    runtimes += [(name, "no", reason) for name, reason in result.unavailable_runtimes.items()]
    yield from ("", _table(["runtime", "available", "details"], runtimes))
    tools = [
        (package, version or "missing", PACKAGES[package][0], "" if version else PACKAGES[package][1])
        for package, version in result.tools.items()
    ]
    yield from ("", _table(["package", "version", "needed by", "install with"], tools))
    yield from ("", _estimates(result))
    yield from _inert(result.inert)


def _estimates(result: Check) -> Table:
    table = _table(["stage", ">peak memory", ">disk", ">CPU time"], ())
    for stage in result.estimates:
        name = f"{stage.stage} ({stage.runtime})" if stage.runtime else stage.stage
        disk = size(stage.disk_bytes) if stage.disk_bytes else ""
        time = f"~{duration(stage.cpu_seconds)}" if stage.cpu_seconds else ""
        table.add_row(name, f"~{size(stage.memory_bytes)}", disk, time)
    free, cores = f"{size(result.disk_free_bytes)} free", f"{result.num_cores} cores"
    table.add_row("this machine", size(result.memory_bytes), free, cores, style="dim")
    return table


def report(validation: ValidationReport) -> Items:
    """For each scenario and metric the gate that uses most of its limit, then the verdict and its scope."""
    rows = []
    scenario = ""
    for gate, num_gates, num_failed in validation.worst_gates:
        heading = "" if gate.scenario == scenario else gate.scenario
        result = Text(f"{num_failed} failed", "red") if num_failed else Text("passed", "green")
        value, limit = f"{gate.value:.3g}", f"{gate.limit:.3g}"
        rows.append((heading, gate.metric, str(num_gates), value, limit, gate.output, result))
        scenario = gate.scenario
    yield _table(["scenario", "metric", ">gates", ">worst", ">limit", "output", "result"], rows)
    if validation.envelope:
        limits = [(x.name, *(f"{n:,}" for n in (x.promised, x.whole, x.alone))) for x in validation.envelope]
        columns = ["limit of the profile", ">promised", ">whole model", ">layers alone"]
        yield from ("", _table(columns, limits))
    passed = len(validation.gates) - len(validation.failed)
    color = "red" if not validation.passed else "green" if validation.is_whole else "yellow"
    summary = f": {passed} of {len(validation.gates)} gates passed; {validation.candidate}"
    yield ""
    yield Text.assemble((validation.verdict, color), f"{summary} compared with {validation.reference}")
    if validation.baseline:
        yield Text(f"rounding baseline: {validation.baseline}", "dim")
    if mismatches := sum(validation.routing_mismatches.values()):
        yield f"routing mismatches (near ties): {mismatches}; compared with the reference on the same experts"
    if validation.text:
        yield from _text(validation.text)
    if validation.bisect:
        yield from ("", *_bisection(validation.bisect))
    yield from (Text(f"not compared: {item}", "dim") for item in validation.not_compared)


def _text(text: TextReport) -> Items:
    title = f"{text.num_tokens:,} tokens of {text.text}"
    if text.base:
        title += f", unquantized model: {text.base}"
    table = _table(["comparison", "mean KL (nats)", "top-1 agreement", "perplexity ratio"], (), title)
    for row in text.comparisons:
        agreement = f"{100 * row.top1_agreement:.2f}% ± {100 * row.top1_agreement_error:.2f}%"
        perplexity = f"{row.perplexity_ratio:.5f} ± {row.perplexity_ratio_error:.5f}"
        table.add_row(row.name, _mean_kl(row), agreement, perplexity)
    yield from ("", table)
    if text.layers:
        rows = [(row.name, _kind(row.kind), _mean_kl(row)) for row in text.layers[:MAX_LAYERS]]
        yield from ("", _table(["layer", "kind", "mean KL (nats), only this layer quantized"], rows))
        yield Text("build --exclude '*.layers.N.mixer' does not quantize layer N", "dim")


def _mean_kl(row: TextComparison) -> str:
    return f"{row.mean_kl:.2e} ± {row.mean_kl_error:.0e}"


def _bisection(bisection: Bisection) -> Items:
    scope = f"{bisection.num_values} values inside the layers compared, each layer alone; {bisection.runs_as}"
    if bisection.diverging:
        summary = f": the first value in each of {len(bisection.diverging)} layers follows; {scope}"
        yield Text.assemble(("diverges", "red"), summary)
    else:
        yield Text.assemble(("no value diverges", "green"), f": {scope}")
    for value in bisection.diverging:
        yield from ("", _divergent_value(value))
    if (nearest := bisection.nearest) and not bisection.diverging:
        percent = f"{100 * nearest.limit_fraction:.0f}%"
        yield f"closest to its limit: {nearest.tensor} ({nearest.op}), at {percent} of it"
    if bisection.num_unmatched:
        yield Text(f"not compared: {bisection.num_unmatched} values without a counterpart in PyTorch", "dim")
    if bisection.marking_changed:
        layers = ", ".join(bisection.marking_changed)
        yield Text(f"exposing inner values changed the results of {layers} bitwise", "yellow")


def _divergent_value(value: DivergentValue) -> Table:
    baseline = "" if value.baseline is None else f", rounding baseline {value.baseline:.3g}"
    error = "not finite" if value.error is None else f"{value.error:.3g}"
    index = ", ".join(map(str, value.index))
    difference = f"{_number(value.candidate)} instead of {_number(value.reference)}"
    grid = Table.grid(padding=(0, 2))
    grid.add_row(Text("layer", "bold"), Text.assemble((value.place, "bold"), f", {value.kind}"))
    grid.add_row("node", f"{value.node}, {value.op}")
    grid.add_row("tensor", f"{value.tensor} [{', '.join(value.shape)}]")
    grid.add_row("relative L2", Text.assemble((error, "red"), f", limit {value.limit:.3g}{baseline}"))
    grid.add_row("largest difference", f"{difference} (step {value.step}, [{index}])")
    for number, line in enumerate(value.reads):
        style = "yellow" if any(word in line for word in CAUSES) else "dim"
        grid.add_row("" if number else "inputs", Text(line, style))
    return grid


def _number(value: float | None) -> str:
    return "not finite" if value is None else f"{value:.6g}"
