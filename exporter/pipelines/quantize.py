"""Quantizes a checkpoint to FP8, and reports what a user should know about the result."""

import shutil
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from nemotrt.exporter.artifacts import QuantizedCheckpoint
from nemotrt.exporter.checkpoint import zero_weights
from nemotrt.exporter.checkpoint.loaded_model import LoadedModel
from nemotrt.exporter.checkpoint.side_files import check_ignored
from nemotrt.exporter.config import PRESETS, BuildConfig
from nemotrt.exporter.errors import UsageError
from nemotrt.exporter.progress import SILENT, BuildLog, Progress
from nemotrt.exporter.quantization import text
from nemotrt.exporter.quantization.presets import recipe_of
from nemotrt.exporter.stages.load import load
from nemotrt.exporter.workspace import sync

MAX_LISTED_EXPERTS = 4


def calibrate_and_quantize(
    model: LoadedModel, config: BuildConfig, folder: Path, build_log: BuildLog, *, per_output: bool
) -> QuantizedCheckpoint:
    """Write the model in FP8 to `folder`, and note in the log what the user should know.

    With `per_output`, each output of an expert has a scale of its own, else each expert has one.
    """
    from nemotrt.exporter.stages.quantize import quantize

    kv_cache, note = config.kv_dtype != "bf16", build_log.note
    recipe = recipe_of(model.config, config.preset, config.exclude, kv_cache=kv_cache, per_output=per_output)
    tokens = text.sequences(model.folder, config.calibration, model.config.bos_token_id)
    name = config.calibration.name if config.calibration else "the built-in text"
    what = f"calibrated on {sum(map(len, tokens)):,} tokens of {name}"
    with build_log.stage("quantize", what, total=len(model.config.layers)) as advance:
        quantized = quantize(model, recipe, tokens, folder, advance=advance)
    cache = ", and the KV cache" if quantized.kv_cache else ""
    kinds = Counter(model.config.numbered_layers[int(name.split(".")[2])] for name in quantized.left_out)
    excluded = ", ".join(f"{number} of {kind} layers" for kind, number in kinds.items())
    note(f"{quantized.num_modules} modules in FP8{cache}; not quantized: {excluded or 'none'}")
    if kinds["mamba"] and config.preset == PRESETS[0]:
        note("--preset published quantizes Mamba layers too: smaller, faster, less exact")
    if quantized.num_tokens == text.MAX_TOKENS:
        note(f"only the first {text.MAX_TOKENS:,} tokens of the text were used")
    if starved := quantized.starved_experts:
        names = ", ".join(starved[:MAX_LISTED_EXPERTS]) + (" …" if len(starved) > MAX_LISTED_EXPERTS else "")
        note(f"{len(starved)} experts saw too few tokens and use their layer's largest range: {names}")
    return quantized


def quantize_checkpoint(
    checkpoint: Path | str,
    output: Path | str,
    *,
    calibration: Path | str | None = None,
    preset: str = PRESETS[0],
    exclude: Sequence[str] = (),
    kv_dtype: str = "auto",
    ignore_fields: Sequence[str] = (),
    allow_zero_weights: bool = False,
    progress: Progress = SILENT,
) -> QuantizedCheckpoint:
    """Write the checkpoint in FP8 to `output`, whole or not at all; raises UsageError if `output` exists.

    `calibration` is a .txt or .jsonl file (default: the built-in text); the other options are those of `BuildConfig`.
    """
    checkpoint, output = Path(checkpoint), Path(output)
    config = BuildConfig(
        checkpoint,
        output,
        calibration=Path(calibration) if calibration else None,
        preset=preset,
        exclude=tuple(exclude),
        kv_dtype=kv_dtype,
        ignore_fields=tuple(ignore_fields),
    )
    if output.exists() or output.is_symlink():
        raise UsageError(f"{output} exists", hint="choose another --output")
    if not output.parent.is_dir():
        raise UsageError(f"{output.parent} is not a folder", hint="create the parent folder of --output")
    with progress.stage("load", checkpoint.resolve().name):
        model = load(checkpoint, ignore_fields=ignore_fields)
    check_ignored(model.config, ignore_fields)
    if model.config.recipe:
        raise UsageError(f"{checkpoint} is FP8 already", hint="nemo-export build accepts it as it is")
    import torch  # noqa: F401  so that it is found missing before every weight is read

    build_log = BuildLog(progress)
    found = zero_weights.find(model.weights, checkpoint, build_log)
    zero_weights.accept(found, build_log.note, allow=allow_zero_weights)
    partial = output.with_name(f".{output.name}.quantizing")
    try:
        partial.mkdir()
    except FileExistsError as error:
        raise UsageError(
            f"{partial} exists: another run is writing there, or one was killed",
            hint="remove it if no other run is active",
        ) from error
    try:
        quantized = calibrate_and_quantize(model, config, partial, build_log, per_output=False)
        load(partial, ignore_fields=ignore_fields)  # never publish a checkpoint that cannot be read back
        sync(partial)
        partial.rename(output)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return quantized
