"""The command `quantize`: convert a checkpoint to FP8."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import click

from nemotrt.exporter.commands.arguments import (
    CALIBRATION,
    CHECKPOINT,
    EXCLUDE,
    JSON,
    KV_DTYPE,
    OUTPUT,
    PRESET,
    command,
)
from nemotrt.exporter.commands.console import Console


@command("quantize examples/tiny --output tiny-fp8")
@CHECKPOINT
@OUTPUT
@CALIBRATION
@PRESET
@EXCLUDE
@KV_DTYPE
@JSON
@click.pass_obj
def quantize(console: Console, /, output: Path, as_json: bool, **options: Any) -> None:
    """Quantize CHECKPOINT to FP8 with static scales, in NVIDIA ModelOpt's layout."""
    from nemotrt.exporter.pipelines.quantize import quantize_checkpoint

    result = quantize_checkpoint(output=output, progress=console, **options)
    if as_json:
        click.echo(json.dumps(dataclasses.asdict(result) | {"folder": str(output)}, indent=2))
