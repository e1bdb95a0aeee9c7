"""The stages of a build in order, one line each, in a workspace that survives a kill."""

from __future__ import annotations

import dataclasses
import shutil
from typing import Any

from nemotrt.exporter import environment
from nemotrt.exporter.artifacts import Gate, LoadedModel, LoweredGraph, ValidationReport
from nemotrt.exporter.config import PRECISION_OF_DTYPE, BuildConfig
from nemotrt.exporter.console import Console
from nemotrt.exporter.errors import ExportError, UsageError, ValidationError
from nemotrt.exporter.workspace import Workspace, digest

GRAPH = "model.onnx"


def build(config: BuildConfig, console: Console) -> dict[str, Any]:
    """Build the bundle at `config.output`; gives what a script wants to know of it.

    Raises ExportError, and then leaves nothing at the output. A build that was killed is continued by the next one
    of the same output.
    """
    from nemotrt.exporter.stages.load import load

    with Workspace.open(config.output, force=config.force) as workspace:
        try:
            with console.stage("load", str(config.checkpoint)):
                model = load(config.checkpoint)
            config = _resolved(config, model)
            key = digest(_identity(config, model))
            _check_disk(config, model)
            return _build(config, model, key, workspace, console)
        except ExportError:
            workspace.clear()
            raise


def _build(
    config: BuildConfig, model: LoadedModel, key: str, workspace: Workspace, console: Console
) -> dict[str, Any]:
    from nemotrt.exporter.stages.bundle import bundle

    graph = _lowered(config, model, key, workspace, console)
    report = _validated(config, model, graph, key, workspace, console)
    failed = [gate for gate in report.gates if not gate.passed] if report else []
    if failed and not config.keep_failed:
        raise ValidationError(
            f"{len(failed)} of {len(report.gates) if report else 0} gates failed; the first: {describe(failed[0])}",
            hint="--keep-failed writes the bundle all the same, for looking into it",
        )
    with console.stage("bundle", str(config.output)):
        manifest = bundle(config, model, graph, report, workspace.folder)
        workspace.publish()
    if failed:
        raise ValidationError(f"{len(failed)} gates failed; {config.output} says so", hint="do not ship it")
    return {
        "bundle": str(config.output),
        "bundle_id": manifest.bundle_id,
        "precision": config.precision,
        "nodes": graph.nodes,
        "weight_bytes": graph.weight_bytes,
        "validation": dataclasses.asdict(manifest.validation),
    }


def _resolved(config: BuildConfig, model: LoadedModel) -> BuildConfig:
    """The configuration with every default that depends on the checkpoint filled in."""
    return dataclasses.replace(config, precision=config.precision or PRECISION_OF_DTYPE[model.config.dtype])


def _identity(config: BuildConfig, model: LoadedModel) -> list[Any]:
    """What decides a stage's result: the tool, the configuration, and the checkpoint's files."""
    files = sorted({tensor.path for weight in model.weights.values() for tensor in weight.tensors})
    stats = [(path.name, path.stat().st_size, path.stat().st_mtime_ns) for path in files]
    fields = {
        name: value
        for name, value in dataclasses.asdict(config).items()
        if name not in ("output", "force", "keep_failed", "validate")
    }
    return [environment.tool_versions(), fields, dataclasses.asdict(model.config), stats]


def _check_disk(config: BuildConfig, model: LoadedModel) -> None:
    from nemotrt.exporter.estimates import graph_bytes

    wanted, free = graph_bytes(model, config.precision), shutil.disk_usage(config.output.parent).free
    if wanted > free:
        raise UsageError(
            f"{config.output.parent} has {free / 1e9:.1f} GB free, the bundle needs {wanted / 1e9:.1f} GB",
            hint="free some space or choose another --output",
        )


def _lowered(
    config: BuildConfig, model: LoadedModel, key: str, workspace: Workspace, console: Console
) -> LoweredGraph:
    """The graph in the workspace; one that an earlier build of the same inputs ended is taken as it is."""
    path = workspace.folder / GRAPH
    if (kept := workspace.result("lower", key)) is not None:
        console.say(f"{'lower':<9} kept from the build before")
        return LoweredGraph(path=path, **kept)
    from nemotrt.exporter.estimates import graph_bytes
    from nemotrt.exporter.stages.lower import lower
    from nemotrt.exporter.stages.trace import trace

    with console.stage("trace", f"{len(model.config.layers)} layers, {len(set(model.config.layers))} kinds"):
        traced = trace(model, config)
    total = graph_bytes(model, config.precision)
    with console.stage("lower", f"{config.precision}, {total / 1e6:.1f} MB of weights"):
        with console.bar("lower", total) as advance:
            graph = lower(model, traced, path, advance=advance)
    kept = {name: value for name, value in dataclasses.asdict(graph).items() if name != "path"}
    workspace.record("lower", key, kept)
    console.detail(f"{graph.nodes} nodes; " + ", ".join(f"{count} {op}" for op, count in graph.ops.items()))
    return graph


def _validated(
    config: BuildConfig,
    model: LoadedModel,
    graph: LoweredGraph,
    key: str,
    workspace: Workspace,
    console: Console,
) -> ValidationReport | None:
    if not config.validate:
        console.say(f"{'validate':<9} skipped: the manifest says that nothing was proved")
        return None
    if (kept := workspace.result("validate", key)) is not None:
        console.say(f"{'validate':<9} kept from the build before")
        return _report_from(kept)
    from nemotrt.exporter.stages.validate import validate

    with console.stage("validate", "ONNX Runtime against PyTorch"):
        report = validate(model, config, graph.path)
    workspace.record("validate", key, dataclasses.asdict(report))
    return report


def _report_from(kept: dict[str, Any]) -> ValidationReport:
    gates = tuple(Gate(**gate) for gate in kept["gates"])
    return ValidationReport(**{**kept, "gates": gates, "not_compared": tuple(kept["not_compared"])})


def describe(gate: Gate) -> str:
    """One gate in words."""
    return f"{gate.scenario}, {gate.output}: {gate.metric} {gate.value:.3g}, limit {gate.limit:.3g}"
