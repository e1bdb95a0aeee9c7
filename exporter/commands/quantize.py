"""quantize: a checkpoint in FP8, as ModelOpt lays it out."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import click

from nemotrt.exporter.commands.arguments import (
    CALIBRATION,
    CHECKPOINT,
    EXCLUDE,
    JSON,
    KV_DTYPE,
    PRESET,
    command,
)
from nemotrt.exporter.commands.console import Console


@command("quantize examples/tiny --output tiny-fp8")
@CHECKPOINT
@click.option(
    "--output",
    "-o",
    type=click.Path(path_type=Path),
    required=True,
    help="The new checkpoint's folder; must not exist.",
)
@CALIBRATION
@PRESET
@EXCLUDE
@KV_DTYPE
@JSON
@click.pass_obj
def quantize(
    console: Console,
    checkpoint: Path,
    output: Path,
    calibration: Path | None,
    preset: str,
    exclude: tuple[str, ...],
    kv_dtype: str,
    as_json: bool,
) -> None:
    """Quantize CHECKPOINT to FP8 with static scales: a checkpoint in ModelOpt's layout, to build from or to serve."""
    from nemotrt.exporter.pipelines.quantize import Quantization, quantize_checkpoint

    wanted = Quantization(calibration, preset, exclude, kv_dtype)
    made = quantize_checkpoint(checkpoint, output, wanted, console)
    if as_json:
        click.echo(json.dumps(dataclasses.asdict(made) | {"folder": str(output)}, indent=2))
