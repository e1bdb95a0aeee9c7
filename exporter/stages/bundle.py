"""Bundle: complete the folder with everything that runs and validates the model, and write its manifest."""

import dataclasses
import re
import shutil
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path

from nemotrt.exporter import environment
from nemotrt.exporter.artifacts import CompiledEngine
from nemotrt.exporter.checkpoint.loaded_model import LoadedModel
from nemotrt.exporter.checkpoint.safetensors_reader import read_json
from nemotrt.exporter.config import BuildConfig
from nemotrt.exporter.lowering.data_layout import data_path
from nemotrt.exporter.report import json_file
from nemotrt.exporter.report.html import bundle_page
from nemotrt.exporter.report.model import ValidationReport
from nemotrt.exporter.runtime import manifest
from nemotrt.exporter.runtime.files import sha256
from nemotrt.exporter.runtime.graph_file import OnnxGraph
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
"""A side file → its role in the manifest; the others belong to the tokenizer."""


def bundle(
    config: BuildConfig,
    model: LoadedModel,
    graph: OnnxGraph,
    engine: CompiledEngine | None,
    report: ValidationReport | None,
    folder: Path,
    log: Sequence[str],
) -> manifest.Manifest:
    """The manifest of `folder`, to which this adds every file except the graph and the engine's.

    `log` has no times and no paths, so that equal builds make equal bundles.
    """
    roles = dict.fromkeys({data_path(graph.path).name, *_weight_files(graph)}, Role.WEIGHTS)
    roles[graph.path.name] = Role.GRAPH
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
    _remove_others(folder, roles)
    content = _manifest(config, model, graph, engine, report, manifest.describe_files(folder, roles))
    if report is not None:
        page = bundle_page(report, graph, folder, content, name=f"{content.source.name}, {config.precision}")
        (folder / json_file.PAGE).write_text(page, encoding="utf-8")
        page_file = manifest.describe_file(folder, json_file.PAGE, Role.REPORT)
        files = sorted((*content.files, page_file), key=lambda file: file.path)
        content = dataclasses.replace(content, files=tuple(files))
    return manifest.write(folder, content)


def _weight_files(graph: OnnxGraph) -> set[str]:
    """The names of the files that hold the graph's weights."""
    return {
        entry.value
        for tensor in graph.proto.graph.initializer
        for entry in tensor.external_data
        if entry.key == "location"
    }


def _remove_others(folder: Path, roles: Mapping[str, Role]) -> None:
    """Remove the stages' temporary files, and those of an earlier build with other options."""
    for path in sorted(folder.rglob("*"), reverse=True):
        if path.is_file() and path.relative_to(folder).as_posix() not in roles:
            path.unlink()
        elif path.is_dir() and not any(path.iterdir()):
            path.rmdir()


def _manifest(
    config: BuildConfig,
    model: LoadedModel,
    graph: OnnxGraph,
    engine: CompiledEngine | None,
    report: ValidationReport | None,
    files: tuple[manifest.BundleFile, ...],
) -> manifest.Manifest:
    origin = model.origin or model
    sources = sorted({tensor.path for weight in origin.weights.values() for tensor in weight.tensors})
    machine, versions = environment.machine(), environment.tool_versions()
    plugins: tuple[manifest.Plugin, ...] = ()
    if engine:
        version = versions["nemo-export"]
        plugins = (manifest.Plugin("nemo_plugins", version, DOMAIN, engine.library, engine.library_build),)
    return manifest.Manifest(
        schema_version=manifest.SCHEMA_VERSION,
        bundle_id="",
        files=files,
        model=manifest.ModelSummary(
            architectures=tuple(read_json(origin.folder / "config.json").get("architectures") or ()),
            layers=dict(Counter(model.config.layers)),
            precision=config.precision,
            vocab_size=model.config.vocab_size,
            eos_token_ids=tuple(sorted(frozenset().union(*model.end_tokens.values()))),
            chosen_layers=model.config.chosen_layers,
            ignored_fields=model.config.ignored_fields,
            zero_weights=origin.zero_weights,
        ),
        source=manifest.Source(
            name=origin.folder.resolve().name,
            config_sha256=sha256(origin.folder / "config.json"),
            files={path.name: path.stat().st_size for path in sources},
        ),
        graph=graph.summary,
        profiles=_profiles(config, graph, engine),
        environment=manifest.BuildEnvironment(machine["os"], machine["arch"], versions),
        plugins=plugins,
        partial=bool(model.config.chosen_layers),
        not_exported=model.not_exported,
        validation=_validation(report),
        license=_license(origin.folder),
    )


def _profiles(
    config: BuildConfig, graph: OnnxGraph, engine: CompiledEngine | None
) -> tuple[manifest.Profile, ...]:
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
    return onnx, dataclasses.replace(
        onnx,
        runtime=engine.runtime,
        path=engine.path,
        max_rows=engine.max_rows,
        runtime_version=engine.version,
        sms=engine.sms,
    )


def _validation(report: ValidationReport | None) -> manifest.ValidationSummary:
    if report is None:
        return manifest.ValidationSummary(
            Verdict.NOT_RUN, 0, 0, "", ("everything: validation was not requested",)
        )
    counts, not_compared = (len(report.gates), len(report.failed)), tuple(map(str, report.not_compared))
    verdict = Verdict.PASSED if report.passed else Verdict.FAILED
    return manifest.ValidationSummary(verdict, *counts, report.candidate, not_compared)


def _license(checkpoint: Path) -> str:
    """The license in the front matter of the model card, the only place where the layout has one."""
    card = checkpoint / "README.md"
    text = card.read_text(encoding="utf-8", errors="replace") if card.is_file() else ""
    match = re.match(r"---\n(?:.*\n)*?license(?:_name)?:\s*(\S+)", text)
    return match[1] if match else "not stated"
