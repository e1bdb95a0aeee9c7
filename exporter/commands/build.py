"""The command `build`: export a checkpoint to a bundle."""

from __future__ import annotations

import dataclasses
import json
from typing import Any

import click

from nemotrt.exporter.commands.arguments import (
    CALIBRATION,
    CHECKPOINT,
    EXCLUDE,
    JSON,
    KV_DTYPE,
    LAYERS,
    OUTPUT,
    PRECISION,
    PRESET,
    RUNTIME,
    SMS,
    STATE_DTYPE,
    WEIGHTS_PLACEMENT,
    command,
)
from nemotrt.exporter.commands.console import Console
from nemotrt.exporter.config import BuildConfig


@command("build examples/tiny --output tiny.bundle")
@CHECKPOINT
@OUTPUT
@PRECISION
@RUNTIME
@SMS
@click.option("--max-tokens", default=2048, help="Maximum tokens per step, over all sequences.")
@click.option("--max-sequences", default=16, help="Maximum sequences per step.")
@click.option("--max-context", default=8192, help="Maximum tokens per sequence.")
@click.option("--page-size", default=128, help="Tokens per page of the KV cache.")
@STATE_DTYPE
@LAYERS
@CALIBRATION
@PRESET
@EXCLUDE
@KV_DTYPE
@WEIGHTS_PLACEMENT
@click.option("--force", is_flag=True, help="Replace an existing bundle.")
@click.option("--no-validate", is_flag=True, help="Skip the comparison with PyTorch; the manifest says so.")
@click.option(
    "--keep-failed", is_flag=True, help="Write the bundle even if a gate fails; the manifest says so."
)
@JSON
@click.pass_obj
def build(
    console: Console, /, precision: str | None, no_validate: bool, as_json: bool, **options: Any
) -> None:
    """Build a bundle from CHECKPOINT and validate it against PyTorch.

    A bundle is a folder with an ONNX graph, its weights, TensorRT engines, a validation report and a manifest.
    """
    from nemotrt.exporter.pipelines import build

    config = BuildConfig(precision=precision or "", validate=not no_validate, **options)
    result = build.build(config, console)
    if as_json:
        click.echo(json.dumps(dataclasses.asdict(result), indent=2))
