"""All that can be known of a build before it writes: what is understood, what stands in its way, what it will need."""

from __future__ import annotations

import dataclasses
import math
import re
import shutil
from collections import defaultdict
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nemotrt.exporter import environment
from nemotrt.exporter.checkpoint.layer_selection import only_layers, partial_model
from nemotrt.exporter.checkpoint.loaded_model import WeightSource
from nemotrt.exporter.checkpoint.quant_config import cache_notes, stored_recipe, with_recipe
from nemotrt.exporter.checkpoint.safetensors_reader import DTYPES, StoredTensor, open_checkpoint, read_json
from nemotrt.exporter.checkpoint.side_files import check_side_files, parse_config, read_config
from nemotrt.exporter.checkpoint.tensor_matching import Survey, match
from nemotrt.exporter.config import COMPUTE_DTYPES, PRECISION_OF_DTYPE, PRESETS
from nemotrt.exporter.engines.targets import AUTO, ONNX, settle
from nemotrt.exporter.errors import CheckpointError, CompileError, ExportError, UsageError
from nemotrt.exporter.generation.tokenizer import TOKENIZER
from nemotrt.exporter.pipelines import estimates
from nemotrt.exporter.pipelines.inspect import Part, Weight, parts, state_of
from nemotrt.exporter.pipelines.runtime_facts import RuntimeFact, engine_target, engines, runtime_facts
from nemotrt.exporter.progress import Advance
from nemotrt.exporter.quantization.presets import recipe_of
from nemotrt.model.config import ModelConfig

FIRST_EXPERT = re.compile(r"(.*\.experts\.)0(\..*)")


@dataclass(frozen=True)
class Subject:
    """What is checked: a configuration and a table of tensors, and the folder that both are of, if there is one."""

    name: str
    config: ModelConfig
    stored: Mapping[str, StoredTensor]
    folder: Path | None
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class Problem:
    """What a build would refuse, and what to do about it."""

    message: str
    hint: str


@dataclass(frozen=True)
class Tool:
    """A package, its version here or nothing, what needs it, and how to get it."""

    package: str
    version: str
    needed_for: str
    get: str


@dataclass(frozen=True)
class Check:
    """The answer: every field is in the JSON that --json prints."""

    name: str
    is_buildable: bool
    problems: tuple[Problem, ...]
    notes: tuple[str, ...]
    num_tensors: int
    num_parameters: int
    num_active_parameters: int
    """Parameters that one token passes: of the routed experts only those that it is sent to."""
    layers: dict[int, str]
    """Each layer's index in the checkpoint → its kind."""
    parts: tuple[Part, ...]
    inert: dict[str, str]
    precision: str
    dtypes: dict[str, dict[str, tuple[str, ...]]]
    """As built: a kind of layer → a dtype → its parameters and pools."""
    runtimes: tuple[RuntimeFact, ...]
    tools: tuple[Tool, ...]
    memory_bytes: int
    disk_free_bytes: int
    num_cores: int
    estimates: tuple[estimates.StageEstimate, ...]
    values_scanned: bool


def of_folder(checkpoint: Path, layers: str = "") -> Subject:
    """A checkpoint folder's configuration and headers; raises CheckpointError on one that cannot be read.

    With `layers`, those of some layers, as a build takes them.
    """
    config, stored = read_config(checkpoint), open_checkpoint(checkpoint)
    return _subject(str(checkpoint), with_recipe(config, stored, checkpoint), stored, checkpoint, (), layers)


def _subject(
    name: str,
    config: ModelConfig,
    stored: Mapping[str, StoredTensor],
    folder: Path | None,
    notes: tuple[str, ...],
    layers: str,
) -> Subject:
    if layers:
        config, stored = only_layers(config, stored, layers)
        if config.chosen_layers:
            notes = (*notes, f"{partial_model(config.chosen_layers)}: the bundle would say so")
    return Subject(name, config, stored, folder, notes)


def of_table(config_file: Path, tensors_file: Path, layers: str = "") -> Subject:
    """A configuration and a table {name: [dtype, shape]}, where expert 0 may stand for all experts.

    Raises CheckpointError on an entry that is no dtype of safetensors and shape.
    """
    config = parse_config(config_file)
    table = read_json(tensors_file)
    stored: dict[str, StoredTensor] = {}
    stands_for_all = False
    for name, entry in table.items():
        names = [name]
        first = FIRST_EXPERT.fullmatch(name)
        if first and f"{first[1]}1{first[2]}" not in table:
            names = [f"{first[1]}{expert}{first[2]}" for expert in range(config.n_routed_experts)]
            stands_for_all = True
        dtype, width, shape = _entry(tensors_file, name, entry)
        length = math.prod(shape) * width
        stored |= {each: StoredTensor(each, dtype, shape, tensors_file, 0, length) for each in names}
    note = f"expert 0 of the table stands for all {config.n_routed_experts}"
    config = config.with_recipe(stored_recipe(config, stored))
    return _subject(tensors_file.name, config, stored, None, (note,) if stands_for_all else (), layers)


def _entry(file: Path, name: str, entry: Any) -> tuple[str, int, tuple[int, ...]]:
    try:
        dtype, shape = entry
        sizes = tuple(shape)
    except (TypeError, ValueError) as error:
        raise CheckpointError(f"{file}: {name} is not [dtype, shape]") from error
    if not isinstance(dtype, str) or dtype not in DTYPES:
        raise CheckpointError(f"{file}: {name} has dtype {dtype}", hint="known: " + " ".join(DTYPES))
    if not all(type(size) is int and size >= 0 for size in sizes):
        raise CheckpointError(f"{file}: {name} has shape {shape}, which is not a list of counts")
    return *DTYPES[dtype], sizes


def check(
    subject: Subject,
    precision: str,
    where: Path,
    scan: Advance | None = None,
    *,
    runtime: str = AUTO,
    sms: tuple[int, ...] = (),
    link: bool = False,
) -> Check:
    """What a build of the subject at `precision` (the checkpoint's own if empty) would do, beside `where`.

    With `scan` every value is read too, and it hears of the bytes. A problem is an entry here, not an error; it is
    none that an engine cannot be built where neither `runtime` nor `sms` asks for one. Raises UsageError on those
    that cannot be meant.
    """
    config = subject.config
    precision = precision or ("fp8" if config.recipe else PRECISION_OF_DTYPE[config.dtype])
    survey = match(config, subject.stored)
    built, refused = _as_built(config, precision)
    problems = [*survey.problems, *refused, *_problems_around(subject, built, runtime, sms, precision)]
    if scan is not None:
        problems += _scan(survey, _dtypes(config, precision), scan)
    work = estimates.work(
        built,
        survey.weights,
        len(subject.stored),
        precision,
        link=link,
        is_stored=subject.folder is not None,
        engines=engines(built, runtime, sms, precision),
    )
    stages = estimates.stages(work)
    free = shutil.disk_usage(where).free
    return Check(
        name=subject.name,
        is_buildable=not problems,
        problems=tuple(Problem(str(error), error.hint) for error in problems),
        notes=(*subject.notes, *_notes(subject, survey, stages, free)),
        num_tensors=len(subject.stored),
        num_parameters=work.parameters,
        num_active_parameters=work.parameters - _idle_parameters(config),
        layers=config.numbered_layers,
        parts=parts(
            config.numbered_layers,
            [Weight(t.name, t.dtype, t.shape, t.length, "") for t in subject.stored.values()],
            state_of(config, COMPUTE_DTYPES["fp32"]),
        ),
        inert=config.inert,
        precision=precision,
        dtypes=_dtypes_by_kind(built, _dtypes(built, precision), precision),
        runtimes=runtime_facts(built, precision),
        tools=_tools(),
        memory_bytes=environment.memory_bytes(),
        disk_free_bytes=free,
        num_cores=environment.num_cores(),
        estimates=stages,
        values_scanned=scan is not None,
    )


def _problems_around(
    subject: Subject, built: ModelConfig, runtime: str, sms: tuple[int, ...], precision: str
) -> list[ExportError]:
    """Those of the checkpoint's other files, and of an engine that was asked for."""
    problems: list[ExportError] = []
    if (folder := subject.folder) is not None:
        problems += _raised(lambda: check_side_files(folder, subject.config))
    if sms or runtime not in (AUTO, ONNX):
        problems += _raised(lambda: engine_target(built, runtime, sms, precision))
    elif runtime == ONNX:
        settle(runtime, sms, precision)
    return problems


def _as_built(config: ModelConfig, precision: str) -> tuple[ModelConfig, list[ExportError]]:
    """The configuration with what a build quantizes by its flags' defaults, and why it would quantize nothing."""
    if precision != "fp8" or config.recipe:
        return config, []
    try:
        return config.with_recipe(recipe_of(config, PRESETS[0], (), kv_cache=True)), []
    except UsageError as error:
        return config, [error]


def _raised(call: Callable[[], object]) -> list[ExportError]:
    try:
        call()
    except (CheckpointError, CompileError) as error:
        return [error]
    return []


def _scan(survey: Survey, dtypes: Mapping[str, str], advance: Advance) -> list[ExportError]:
    """What reading every value finds: one problem a parameter, its first."""

    def read(parameter: str, source: WeightSource) -> None:
        import torch

        from nemotrt.exporter.checkpoint import weights

        dtype = getattr(torch, dtypes[parameter])
        for tensor in source.tensors:
            for piece in weights.convert(tensor, source.transform, dtype):
                advance(len(piece) * tensor.length // math.prod(tensor.shape))

    found: list[ExportError] = []
    for parameter, source in survey.weights.items():
        found += _raised(lambda parameter=parameter, source=source: read(parameter, source))  # type: ignore[misc]
    return found


def scan_bytes(subject: Subject) -> int:
    """Bytes that a scan of every value reads."""
    sources = match(subject.config, subject.stored).weights.values()
    return sum(tensor.length for source in sources for tensor in source.tensors)


def _idle_parameters(config: ModelConfig) -> int:
    """Parameters of the routed experts that a token is not sent to."""
    idle = config.n_routed_experts - config.num_experts_per_tok
    expert = 2 * config.moe_intermediate_size * config.expert_size
    return config.layers.count("moe") * idle * expert


def _dtypes(config: ModelConfig, precision: str) -> dict[str, str]:
    """The dtype that each parameter is built in."""
    import torch

    from nemotrt.model.hybrid import NemotronH

    network = NemotronH(config, dtype=getattr(torch, COMPUTE_DTYPES[precision]), device="meta")
    return {name: str(value.dtype).removeprefix("torch.") for name, value in network.state_dict().items()}


def _dtypes_by_kind(
    config: ModelConfig, dtypes: Mapping[str, str], precision: str
) -> dict[str, dict[str, tuple[str, ...]]]:
    """The first layer of each kind, and what stands beside the layers: a dtype → what is in it."""
    found: dict[str, dict[str, list[str]]] = defaultdict(lambda: defaultdict(list))
    first = {kind: index for index, kind in reversed(config.numbered_layers.items())}
    for name, dtype in dtypes.items():
        for kind, index in first.items():
            prefix = f"backbone.layers.{index}."
            if name.startswith(prefix):
                own = name.removeprefix(prefix)
                is_norm = own == "mixer.norm.weight"  # not the block's, which is norm.weight
                found[kind][dtype].append(own if is_norm else own.removeprefix("mixer."))
        if not name.startswith("backbone.layers."):
            found["beside"][dtype].append(name.removeprefix("backbone."))
    pools = state_of(dataclasses.replace(config, dtype=COMPUTE_DTYPES[precision]), COMPUTE_DTYPES["fp32"])
    for pool in pools:
        pool_kind, number = pool.name.split(".")
        layer = config.numbered_layers[int(number)]
        if first[layer] == int(number):
            found[layer][pool.dtype].append(pool_kind)
    return {
        kind: {dtype: tuple(names) for dtype, names in by_dtype.items()} for kind, by_dtype in found.items()
    }


def _tools() -> tuple[Tool, ...]:
    """What a build needs of this machine."""
    versions = environment.tool_versions()
    runtime = versions.get("onnxruntime") or versions.get("onnxruntime-gpu") or ""
    return (
        Tool("torch", versions.get("torch", ""), "every stage", "pip install 'torch>=2.11'"),
        Tool("onnx", versions.get("onnx", ""), "lower", "pip install 'onnx>=1.18'"),
        Tool("onnx-ir", versions.get("onnx-ir", ""), "lower", "pip install 'onnx-ir>=1.0'"),
        Tool("onnxruntime", runtime, "validate, generate", "pip install 'nemo-export[cpu]'"),
    )


def _notes(
    subject: Subject, survey: Survey, stages: tuple[estimates.StageEstimate, ...], free: int
) -> list[str]:
    """What a build would go along with, and its owner should know."""
    found = [*cache_notes(subject.config)]
    if survey.not_exported:
        found.append(f"{len(survey.not_exported)} tensors of multi-token prediction (mtp.*) are not exported")
    if subject.folder is None:
        found.append("no weights were looked at: the table stands for them")
    elif not (subject.folder / TOKENIZER).is_file():
        found.append(f"there is no {TOKENIZER}: the bundle will take token ids, and no text")
    memory = environment.memory_bytes()
    for stage in stages:
        name = f"{stage.stage} for {stage.runtime}" if stage.runtime else stage.stage
        if stage.memory_bytes > memory:
            found.append(
                f"{name} needs about {stage.memory_bytes / 1e9:.3g} GB of memory, this machine has"
                f" {memory / 1e9:.3g} GB"
                + (f": {estimates.WITHOUT_WHOLE_STEPS}" if stage.stage == "validate" else "")
            )
        if stage.disk_bytes > free:
            found.append(f"{name} writes {stage.disk_bytes / 1e9:.3g} GB, {free / 1e9:.3g} GB are free here")
    found += [
        f"{tool.package} is missing for {tool.needed_for}: {tool.get}"
        for tool in _tools()
        if not tool.version
    ]
    return found
