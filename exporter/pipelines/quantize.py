"""A checkpoint quantized to FP8, with what a person should know of it said: for `quantize` and for a build."""

from __future__ import annotations

import logging
import shutil
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from nemotrt.exporter.artifacts import QuantizedCheckpoint
from nemotrt.exporter.checkpoint.loaded_model import LoadedModel
from nemotrt.exporter.errors import UsageError
from nemotrt.exporter.progress import SILENT, Progress
from nemotrt.exporter.quantization.presets import recipe_of
from nemotrt.exporter.quantization.text import MAX_TOKENS, sequences
from nemotrt.exporter.stages.load import load
from nemotrt.exporter.workspace import sync

MAX_EXPERTS_SAID = 4

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Quantization:
    """What is asked of a quantization."""

    text: Path | None
    """To calibrate on; none for the built-in text."""
    preset: str
    exclude: tuple[str, ...]
    kv_dtype: str


def calibrated(
    model: LoadedModel,
    wanted: Quantization,
    folder: Path,
    progress: Progress,
    *,
    per_output: bool,
    note: Callable[[str], None] = log.info,
) -> QuantizedCheckpoint:
    """The model in FP8 in `folder`, with a scale for each output of an expert or for each expert."""
    from nemotrt.exporter.stages.quantize import quantize

    recipe = recipe_of(
        model.config,
        wanted.preset,
        wanted.exclude,
        kv_cache=wanted.kv_dtype != "bf16",
        per_output=per_output,
    )
    tokens = sequences(model.folder, wanted.text, model.config.bos_token_id)
    count = sum(map(len, tokens))
    name = wanted.text.name if wanted.text else "the built-in text"
    layers = len(model.config.layers)
    with progress.stage("quantize", f"calibrated on {count:,} tokens of {name}", total=layers) as advance:
        made = quantize(model, recipe, tokens, folder, advance=advance)
    cache = ", and the KV cache" if made.kv_cache else ""
    kinds = Counter(model.config.numbered_layers[int(name.split(".")[2])] for name in made.left_out)
    kept = ", ".join(f"{number} of {kind} layers" for kind, number in kinds.items())
    note(f"{made.num_modules} modules in FP8{cache}; left as they are: {kept or 'none'}")
    if kinds["mamba"] and wanted.preset == "conservative":
        note("--preset published quantizes Mamba layers too: smaller, faster, less exact")
    if count == MAX_TOKENS:
        note(f"only the first {MAX_TOKENS:,} tokens of the text were taken")
    if starved := made.starved_experts:
        shown = ", ".join(starved[:MAX_EXPERTS_SAID]) + (" …" if len(starved) > MAX_EXPERTS_SAID else "")
        note(f"{len(starved)} experts saw too few tokens and take their layer's largest range: {shown}")
    return made


def quantize_checkpoint(
    checkpoint: Path, output: Path, wanted: Quantization, progress: Progress = SILENT
) -> QuantizedCheckpoint:
    """The checkpoint in FP8 at `output`, whole or not at all; raises UsageError where something stands there."""
    if output.exists() or output.is_symlink():
        raise UsageError(f"{output} exists", hint="choose another --output")
    if not output.parent.is_dir():
        raise UsageError(
            f"{output.parent} is not a folder", hint="make the folder that --output is to stand in"
        )
    with progress.stage("load", checkpoint.resolve().name):
        model = load(checkpoint)
    if model.config.recipe:
        raise UsageError(f"{checkpoint} is FP8 already", hint="nemo-export build takes it as it is")
    partial = output.with_name(f".{output.name}.quantizing")
    try:
        partial.mkdir()
    except FileExistsError as error:
        raise UsageError(
            f"{partial} exists: another run writes there, or one was killed", hint="remove it if none runs"
        ) from error
    try:
        made = calibrated(model, wanted, partial, progress, per_output=False)
        load(partial)  # what cannot be read back is not handed over
        sync(partial)
        partial.rename(output)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return made
