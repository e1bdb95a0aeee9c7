"""The command `quantize`: convert a checkpoint to FP8."""

from pathlib import Path
from typing import Any

import click

from nemotrt.exporter.commands import arguments
from nemotrt.exporter.commands.console import Console


@arguments.command("quantize examples/tiny --output tiny-fp8")
@arguments.CHECKPOINT
@arguments.OUTPUT
@arguments.CALIBRATION
@arguments.PRESET
@arguments.EXCLUDE
@arguments.KV_DTYPE
@arguments.IGNORE_FIELD
@arguments.ALLOW_ZERO_WEIGHTS
@arguments.JSON
@click.pass_obj
def quantize(console: Console, /, output: Path, as_json: bool, **options: Any) -> None:
    """Quantize CHECKPOINT to FP8 with static scales, in NVIDIA ModelOpt's layout."""
    from nemotrt.exporter.pipelines.quantize import quantize_checkpoint

    result = quantize_checkpoint(output=output, progress=console, **options)
    if as_json:
        arguments.print_json(vars(result) | {"folder": str(output)})
