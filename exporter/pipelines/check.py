"""What a build would produce, need and refuse, determined before it starts."""

import dataclasses
import math
import shutil
from collections import defaultdict
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from nemotrt.exporter import environment
from nemotrt.exporter.checkpoint import zero_weights
from nemotrt.exporter.checkpoint.layer_selection import only_layers, partial_model
from nemotrt.exporter.checkpoint.loaded_model import WeightSource
from nemotrt.exporter.checkpoint.other_formats import check_names
from nemotrt.exporter.checkpoint.quant_config import cache_notes, with_recipe
from nemotrt.exporter.checkpoint.safetensors_reader import StoredTensor
from nemotrt.exporter.checkpoint.side_files import (
    check_ignored,
    check_residual,
    check_side_files,
    end_token_notes,
    parse_config,
)
from nemotrt.exporter.checkpoint.tensor_matching import MatchedTensors, check_tied_head, match
from nemotrt.exporter.checkpoint.tensor_table import described_tensors, read_table
from nemotrt.exporter.config import PRESETS, WEIGHTS, BuildConfig, Precision
from nemotrt.exporter.engines.kernel_coverage import check_supported
from nemotrt.exporter.engines.plugin_library import is_at_hand
from nemotrt.exporter.engines.targets import AUTO, ONNX, Target, settle
from nemotrt.exporter.errors import BundleError, CheckpointError, CompileError, ExportError, UsageError
from nemotrt.exporter.generation.tokenizer import TOKENIZER
from nemotrt.exporter.pipelines import estimates
from nemotrt.exporter.pipelines.inspect import Part, parts_of, stored_weights
from nemotrt.exporter.progress import SILENT, Progress
from nemotrt.exporter.quantization.presets import recipe_of
from nemotrt.exporter.runtime.backends import BACKENDS, backend
from nemotrt.exporter.stages import load
from nemotrt.model.checkpoint import parameter_dtype, tensor_sources
from nemotrt.model.config import ModelConfig
from nemotrt.model.step import pool_specs
from nemotrt.plugins.contract import LayerName

PACKAGES = {
    "torch": ("every stage", "pip install 'torch>=2.11'"),
    "onnx": ("lower", "pip install 'onnx>=1.18'"),
    "onnx-ir": ("lower", "pip install 'onnx-ir>=1.0'"),
    "onnxruntime": ("validate, generate", "pip install 'nemo-export[cpu]'"),
}
"""Package → the stages that need it, and how to install it."""

RUN_AS_IS = "ONNX Runtime runs it on the CPU as it is"
EMULATED = "ONNX Runtime emulates it in FP32 on a CPU, rounding as the graph does"


@dataclass(frozen=True)
class Headers:
    """A checkpoint's configuration and its table of tensors; `folder` is None if there are no weight files."""

    name: str
    config: ModelConfig
    stored: Mapping[str, StoredTensor]
    folder: Path | None
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class Check:
    """Everything that `check` determines; `as_dict` is what --json prints."""

    name: str
    problems: tuple[ExportError, ...]
    """Reasons why a build would stop."""
    notes: tuple[str, ...]
    num_tensors: int
    num_parameters: int
    """Parameters of the model that the configuration describes."""
    num_active_parameters: int
    """Parameters that one token passes: of the routed experts only those that it is routed to."""
    layers: dict[int, str]
    """Layer index in the checkpoint → kind."""
    parts: tuple[Part, ...]
    inert: dict[str, str]
    precision: str
    dtypes: dict[str, dict[str, tuple[str, ...]]]
    """Kind of layer → dtype in the graph → its parameters and pools."""
    runtimes: dict[str, str]
    """Runtime that a build here can target → how it runs the bundle."""
    unavailable_runtimes: dict[str, str]
    """Runtime → why a build here cannot target it."""
    tools: dict[str, str]
    """Package of PACKAGES → installed version, or empty."""
    memory_bytes: int
    disk_free_bytes: int
    num_cores: int
    estimates: tuple[estimates.StageEstimate, ...]
    values_scanned: bool

    @property
    def is_buildable(self) -> bool:
        """Whether nothing would stop a build."""
        return not self.problems

    def as_dict(self) -> dict[str, Any]:
        """All fields as JSON values."""
        runtimes = [(name, True, how) for name, how in self.runtimes.items()]
        runtimes += [(name, False, why) for name, why in self.unavailable_runtimes.items()]
        fields = dataclasses.asdict(dataclasses.replace(self, problems=()))
        del fields["unavailable_runtimes"]
        return (
            {"name": self.name, "is_buildable": self.is_buildable}
            | fields
            | {
                "problems": [{"message": str(error), "hint": error.hint} for error in self.problems],
                "runtimes": [{"name": name, "is_built": built, "why": why} for name, built, why in runtimes],
                "tools": [
                    {"package": name, "version": self.tools[name], "needed_for": stages, "get": command}
                    for name, (stages, command) in PACKAGES.items()
                ],
            }
        )


def read_headers(checkpoint: Path, layers: str = "", ignore_fields: Collection[str] = ()) -> Headers:
    """The headers of a checkpoint folder, or only those of `layers`; raises CheckpointError on unreadable files."""
    config, stored = load.read_headers(checkpoint, layers, ignore_fields)
    check_ignored(config, ignore_fields)
    return Headers(str(checkpoint), config, stored, checkpoint)


def read_config(
    config_file: Path,
    tensors_file: Path | None = None,
    layers: str = "",
    ignore_fields: Collection[str] = (),
) -> Headers:
    """Headers from a configuration, and from a table {name: [dtype, shape]} if there is one.

    Raises CheckpointError as the readers of both do.
    """
    config = parse_config(config_file, ignore_fields)
    check_ignored(config, ignore_fields)
    if tensors_file is None:
        config = with_recipe(config, {}, None)
        stored, notes = described_tensors(config_file, config)
    else:
        stored, notes = read_table(tensors_file, config)
        check_names(stored)
        config = with_recipe(config, stored, None)
    config, selected = only_layers(config, stored, layers)
    return Headers((tensors_file or config_file).name, config, selected, None, notes)


def check(
    headers: Headers,
    precision: str = "",
    *,
    output_folder: Path = Path(),
    runtime: str = AUTO,
    sms: tuple[int, ...] = (),
    weights: str = WEIGHTS[0],
    deep: bool = False,
    allow_zero_weights: bool = False,
    progress: Progress = SILENT,
) -> Check:
    """What a build at `precision` (default: the checkpoint's own) into `output_folder` would produce and need.

    With `deep`, every weight is read and converted. Problems are returned, not raised; an engine that cannot be built
    is a problem only if `runtime` or `sms` requests it. Raises UsageError on options that contradict each other.
    """
    config = headers.config
    precision = precision or ("fp8" if config.recipe else Precision.of(config.dtype))
    build = BuildConfig(Path(), output_folder, precision, runtime=runtime, sms=sms, weights=weights)
    tensors = match(config, headers.stored)
    built, recipe_problems = _as_built(config, precision)
    end_tokens, problems = _side_files(headers)
    problems += [*tensors.problems, *recipe_problems, *_other_problems(headers, built, build)]
    notes = _notes(headers, tensors, end_tokens)
    if deep:
        problems += _scan(headers, tensors.weights, precision, notes, progress, allow=allow_zero_weights)
    targets, unavailable = _engine_targets(built, build)
    stages = estimates.stages(
        built,
        tensors.weights,
        len(headers.stored),
        build,
        is_stored=headers.folder is not None,
        engines=_num_uncompiled(targets, build),
    )
    free, tools = shutil.disk_usage(output_folder).free, _installed_packages()
    stored, pools = stored_weights(headers.stored), pool_specs(config, page_size=1, dtype=config.dtype)
    return Check(
        name=headers.name,
        problems=tuple(problems),
        notes=(*notes, *_shortages(stages, free), *_missing(tools)),
        num_tensors=len(headers.stored),
        num_parameters=estimates.num_model_parameters(config),
        num_active_parameters=estimates.num_active_parameters(config),
        layers=config.numbered_layers,
        parts=parts_of(config.numbered_layers, stored, pools),
        inert=config.inert,
        precision=precision,
        dtypes=_dtypes_by_kind(built, precision),
        runtimes={"onnx": RUN_AS_IS if precision == "fp32" else EMULATED}
        | {name: target.title for name, target in targets.items()},
        unavailable_runtimes=unavailable,
        tools=tools,
        memory_bytes=environment.memory_bytes(),
        disk_free_bytes=free,
        num_cores=environment.num_cores(),
        estimates=stages,
        values_scanned=deep,
    )


def _as_built(config: ModelConfig, precision: str) -> tuple[ModelConfig, list[ExportError]]:
    """The configuration with the modules that a build quantizes by default, or why it would quantize nothing."""
    if precision != "fp8" or config.recipe:
        return config, []
    try:
        return config.with_recipe(recipe_of(config, PRESETS[0], (), kv_cache=True)), []
    except UsageError as error:
        return config, [error]


def _other_problems(headers: Headers, built: ModelConfig, build: BuildConfig) -> list[ExportError]:
    """Problems of the residual, of a second head, and of an engine that was requested."""
    problems = _raised(lambda: check_residual(headers.config, build.precision))
    if headers.folder is not None:
        problems += _raised(lambda: check_tied_head(headers.config, headers.stored))
    if build.sms or build.runtime not in (AUTO, ONNX):
        problems += _raised(lambda: engine_target(built, build))
    return problems


def _side_files(headers: Headers) -> tuple[tuple[str, ...], list[ExportError]]:
    """The notes on end-of-text tokens, and the problem of a broken tokenizer, template or other such file."""
    if headers.folder is None:
        return (), []
    try:
        return end_token_notes(check_side_files(headers.folder, headers.config)), []
    except CheckpointError as error:
        return (), [error]


def _raised(call: Callable[[], object]) -> list[ExportError]:
    try:
        call()
    except (BundleError, CheckpointError, CompileError) as error:
        return [error]
    return []


def _scan(
    headers: Headers,
    sources: Mapping[str, WeightSource],
    precision: str,
    notes: list[str],
    progress: Progress,
    *,
    allow: bool,
) -> list[ExportError]:
    """The first problem of each parameter's values, and that of zero weights unless `allow`; notes the latter."""
    from nemotrt.exporter.checkpoint import weights

    problems: list[ExportError] = []
    computed = Precision(precision).dtype
    total = sum(tensor.length for source in sources.values() for tensor in source.tensors)
    with progress.stage("scan", "every weight", total=total, is_bytes=True) as advance:
        for parameter, source in sources.items():
            dtype = parameter_dtype(headers.config, parameter, computed)
            try:
                for tensor in source.tensors:
                    for values in weights.convert(tensor, source.transform, dtype):
                        advance(len(values) * tensor.length // math.prod(tensor.shape))
            except CheckpointError as error:
                problems.append(error)
    find = partial(zero_weights.find, sources, headers.folder or Path(), progress)
    return problems + _raised(lambda: zero_weights.accept(find(), notes.append, allow=allow))


def _dtypes_by_kind(config: ModelConfig, precision: str) -> dict[str, dict[str, tuple[str, ...]]]:
    """Kind of layer, `embeddings` or `head` → dtype → parameters and pools of the first such layer."""
    dtype = Precision(precision).dtype
    dtypes = {name: parameter_dtype(config, name, dtype) for name in tensor_sources(config)}
    dtypes |= {pool.name: pool.dtype for pool in pool_specs(config, dtype=dtype)}
    first_layers = {kind: index for index, kind in reversed(config.numbered_layers.items())}
    names: dict[str, dict[str, list[str]]] = defaultdict(lambda: defaultdict(list))
    for name, dtype in dtypes.items():
        parsed = LayerName.parse(name)
        assert parsed is not None, name
        if parsed.layer is None:
            names[parsed.part][dtype].append(name.removeprefix("backbone."))
        elif first_layers[kind := config.numbered_layers[parsed.layer]] == parsed.layer:
            # The mixer's norm keeps its prefix, because the block has a norm.weight too.
            prefix = "" if parsed.inner == "mixer.norm.weight" else "mixer."
            names[kind][dtype].append(parsed.inner.removeprefix(prefix))
    return {
        kind: {dtype: tuple(inner) for dtype, inner in by_dtype.items()} for kind, by_dtype in names.items()
    }


def _engine_targets(config: ModelConfig, build: BuildConfig) -> tuple[dict[str, Target], dict[str, str]]:
    """Runtime → the engine that a build on this machine would make by default; the others → why not."""
    targets, unavailable = {}, {}
    for candidate in BACKENDS:
        try:
            each = dataclasses.replace(build, runtime=candidate.runtime, sms=())
            targets[candidate.runtime] = engine_target(config, each)
        except (CompileError, UsageError) as error:
            unavailable[candidate.runtime] = f"{error}: {error.hint}"
    return targets, unavailable


def _num_uncompiled(targets: Mapping[str, Target], build: BuildConfig) -> dict[str, int]:
    """Runtime whose engine a build would make → number of GPU generations without a compiled plugin library."""
    sms = {name: build.sms or target.sms for name, target in targets.items()}
    return {
        name: 0 if is_at_hand(build, sms[name]) else len(sms[name])
        for name in targets
        if build.runtime in (AUTO, name) and not (build.sms and backend(name).needs_gpu)
    }


def engine_target(config: ModelConfig, build: BuildConfig) -> Target:
    """The engine that the build would make; raises CompileError or UsageError like the build."""
    target = settle(build.runtime, build.sms, build.precision)
    pools = pool_specs(config, page_size=build.page_size, dtype=build.dtype, state_dtype=build.state)
    check_supported(config, build, pools, target.sms)
    return target


def _notes(headers: Headers, tensors: MatchedTensors, end_tokens: tuple[str, ...]) -> list[str]:
    """Notes for the user on what a build accepts."""
    layers = headers.config.chosen_layers
    notes = [*headers.notes]
    notes += [f"{partial_model(layers)} (the bundle would say so)"] if layers else []
    notes += [
        f"{name} of config.json is ignored, as requested (the bundle would say so)"
        for name in headers.config.ignored_fields
    ]
    notes += cache_notes(headers.config)
    if tensors.not_exported:
        notes.append(
            f"{len(tensors.not_exported)} tensors of multi-token prediction (mtp.*) are not exported"
        )
    if headers.folder is None:
        return notes
    notes += end_tokens
    if not (headers.folder / TOKENIZER).is_file():
        notes.append(f"there is no {TOKENIZER}: the bundle will take token ids only, no text")
    return notes


def _shortages(stages: tuple[estimates.StageEstimate, ...], free: int) -> list[str]:
    notes, memory = [], environment.memory_bytes()
    for stage in stages:
        name = f"{stage.stage} for {stage.runtime}" if stage.runtime else stage.stage
        if stage.memory_bytes > memory:
            hint = f": {estimates.WITHOUT_WHOLE_STEPS}" if stage.stage == "validate" else ""
            notes.append(
                f"{name} needs about {stage.memory_bytes / 1e9:.3g} GB of memory,"
                f" this machine has {memory / 1e9:.3g} GB{hint}"
            )
        if stage.disk_bytes > free:
            notes.append(f"{name} writes {stage.disk_bytes / 1e9:.3g} GB, {free / 1e9:.3g} GB are free here")
    return notes


def _installed_packages() -> dict[str, str]:
    versions = environment.tool_versions()
    versions.setdefault("onnxruntime", versions.get("onnxruntime-gpu", ""))
    return {package: versions.get(package, "") for package in PACKAGES}


def _missing(tools: Mapping[str, str]) -> list[str]:
    missing = {name: PACKAGES[name] for name, version in tools.items() if not version}
    return [f"{name} is missing for {stages}: {command}" for name, (stages, command) in missing.items()]
