"""Bundle: everything that runs the model and proves it, in one folder that its manifest describes to the byte."""

from __future__ import annotations

import dataclasses
import json
import re
import shutil
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from nemotrt.exporter import environment
from nemotrt.exporter.artifacts import CompiledEngine, LoweredGraph
from nemotrt.exporter.checkpoint.loaded_model import LoadedModel
from nemotrt.exporter.config import BuildConfig
from nemotrt.exporter.lowering.external_data import data_path
from nemotrt.exporter.report import json_file
from nemotrt.exporter.report.html import bundle_page
from nemotrt.exporter.report.model import ValidationReport
from nemotrt.exporter.runtime import manifest
from nemotrt.exporter.runtime.files import sha256
from nemotrt.exporter.runtime.graph_file import OnnxGraph
from nemotrt.exporter.runtime.graph_summary import describe_graph
from nemotrt.exporter.runtime.manifest import Role, Verdict
from nemotrt.plugins.spec import DOMAIN

LOG = "logs/build.log"

ROLES = {
    "config.json": Role.CONFIG,
    "hf_quant_config.json": Role.QUANTIZATION,
    "generation_config.json": Role.GENERATION_CONFIG,
    "chat_template.jinja": Role.CHAT_TEMPLATE,
    "LICENSE": Role.LICENSE,
    "NOTICE": Role.LICENSE,
}
"""A side file → its role in the manifest; every other one is the tokenizer's."""


def bundle(
    config: BuildConfig,
    model: LoadedModel,
    graph: LoweredGraph,
    engine: CompiledEngine | None,
    report: ValidationReport | None,
    folder: Path,
    log: Sequence[str],
) -> manifest.Manifest:
    """The manifest of `folder`, which already holds the graph and now everything else too.

    `log` has what the build said, and neither times nor paths, so that equal builds make equal bundles.
    """
    roles = {graph.path.name: Role.GRAPH, data_path(graph.path).name: Role.WEIGHTS}
    roles |= dict.fromkeys(graph.linked, Role.WEIGHTS)
    if engine is not None:
        roles |= {engine.path: Role.ENGINE, engine.library: Role.PLUGINS, engine.log: Role.LOG}
        roles |= {engine.timings: Role.TIMING_CACHE} if engine.timings else {}
    for name in model.side_files:
        shutil.copyfile(model.folder / name, folder / name)
        roles[name] = ROLES.get(name, Role.TOKENIZER)
    if report is not None:
        (folder / json_file.NAME).write_text(json_file.text(report), encoding="utf-8")
        roles[json_file.NAME] = Role.REPORT
    roles[LOG] = Role.LOG
    (folder / LOG).parent.mkdir(exist_ok=True)
    (folder / LOG).write_text("".join(f"{line.rstrip()}\n" for line in log), encoding="utf-8")
    for path in folder.rglob("*"):
        if path.is_file() and path.relative_to(folder).as_posix() not in roles:
            path.unlink()  # the stages' own, and what an earlier build of other options left in the workspace
    for path in sorted(folder.rglob("*"), reverse=True):
        if path.is_dir() and not any(path.iterdir()):
            path.rmdir()
    described = _describe(config, model, graph, engine, report, folder, roles)
    if report is not None:
        name = f"{described.source.name}, {config.precision}"
        page = bundle_page(report, folder, described, name=name)
        (folder / json_file.PAGE).write_text(page, encoding="utf-8")
        listed = manifest.describe_file(folder, json_file.PAGE, Role.REPORT)
        files = sorted((*described.files, listed), key=lambda file: file.path)
        described = dataclasses.replace(described, files=tuple(files))
    return manifest.write(folder, described)


def _describe(
    config: BuildConfig,
    model: LoadedModel,
    graph: LoweredGraph,
    engine: CompiledEngine | None,
    report: ValidationReport | None,
    folder: Path,
    roles: dict[str, Role],
) -> manifest.Manifest:
    origin = model.origin or model
    raw = (origin.folder / "config.json").read_bytes()
    files = sorted({tensor.path for weight in origin.weights.values() for tensor in weight.tensors})
    machine = environment.machine()
    return manifest.Manifest(
        schema_version=manifest.SCHEMA_VERSION,
        bundle_id="",
        files=manifest.describe_files(folder, roles),
        model=manifest.ModelSummary(
            architectures=tuple(json.loads(raw).get("architectures") or ()),
            layers=dict(Counter(model.config.layers)),
            precision=config.precision,
            vocab_size=model.config.vocab_size,
            eos_token_ids=model.config.eos_token_id,
            chosen_layers=model.config.chosen_layers,
        ),
        source=manifest.Source(
            name=origin.folder.resolve().name,
            config_sha256=sha256(origin.folder / "config.json"),
            files={path.name: path.stat().st_size for path in files},
        ),
        graph=describe_graph(OnnxGraph.read(graph.path)),
        profiles=_profiles(config, graph, engine),
        environment=manifest.BuildEnvironment(machine["os"], machine["arch"], environment.tool_versions()),
        plugins=_plugins(engine),
        partial=bool(model.config.chosen_layers),
        not_exported=model.not_exported,
        validation=_verdict(report),
        license=_license(origin.folder),
    )


def _profiles(
    config: BuildConfig, graph: LoweredGraph, engine: CompiledEngine | None
) -> tuple[manifest.Profile, ...]:
    """The graph's, and the engine's where there is one."""
    onnx = manifest.Profile(
        runtime="onnx",
        path=graph.path.name,
        max_tokens=config.max_tokens,
        max_sequences=config.max_sequences,
        max_context=config.max_context,
        page_size=config.page_size,
    )
    if engine is None:
        return (onnx,)
    own = dataclasses.replace(
        onnx,
        runtime=engine.runtime,
        path=engine.path,
        max_rows=engine.max_rows,
        runtime_version=engine.version,
        sms=engine.sms,
    )
    return (onnx, own)


def _plugins(engine: CompiledEngine | None) -> tuple[manifest.Plugin, ...]:
    if engine is None:
        return ()
    version = environment.tool_versions()["nemo-export"]
    return (manifest.Plugin("nemo_plugins", version, DOMAIN, engine.library, engine.library_build),)


def _verdict(report: ValidationReport | None) -> manifest.ValidationSummary:
    if report is None:
        return manifest.ValidationSummary(
            Verdict.NOT_RUN, 0, 0, "", ("everything: validation was not requested",)
        )
    failed = sum(not gate.passed for gate in report.gates)
    verdict = Verdict.PASSED if report.passed else Verdict.FAILED
    not_compared = tuple(map(str, report.not_compared))
    return manifest.ValidationSummary(verdict, len(report.gates), failed, report.candidate, not_compared)


def _license(checkpoint: Path) -> str:
    """What the model card's front matter says, the one place where the layout states a license."""
    card = checkpoint / "README.md"
    text = card.read_text(encoding="utf-8", errors="replace") if card.is_file() else ""
    found = re.match(r"---\n(?:.*\n)*?license(?:_name)?:\s*(\S+)", text)
    return found.group(1) if found else "not stated"
