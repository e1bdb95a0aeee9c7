"""build: a checkpoint becomes a bundle."""

from __future__ import annotations

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
    LAYERS,
    PRESET,
    RUNTIME,
    SMS,
    WEIGHTS_LIE,
    command,
)
from nemotrt.exporter.commands.console import Console
from nemotrt.exporter.config import PRECISIONS, BuildConfig


@command("build examples/tiny --output tiny.bundle")
@CHECKPOINT
@click.option(
    "--output",
    "-o",
    type=click.Path(path_type=Path),
    required=True,
    help="The bundle's folder; must not exist.",
)
@click.option(
    "--precision", type=click.Choice(PRECISIONS), default=None, help="Default: the checkpoint's own."
)
@RUNTIME
@SMS
@click.option(
    "--max-tokens", default=2048, show_default=True, help="Tokens a step, of all sequences together."
)
@click.option("--max-sequences", default=16, show_default=True, help="Sequences a step.")
@click.option("--max-context", default=8192, show_default=True, help="Tokens a sequence.")
@click.option("--page-size", default=128, show_default=True, help="Tokens a page of the KV cache.")
@click.option(
    "--state-dtype",
    type=click.Choice(["fp32", "fp16"]),
    default="fp32",
    show_default=True,
    help="Of the recurrent state.",
)
@LAYERS
@CALIBRATION
@PRESET
@EXCLUDE
@KV_DTYPE
@WEIGHTS_LIE
@click.option("--force", is_flag=True, help="Replace an existing bundle.")
@click.option("--no-validate", is_flag=True, help="Do not compare with PyTorch; the manifest says so.")
@click.option(
    "--keep-failed", is_flag=True, help="Write the bundle even if a gate fails; the manifest says so."
)
@JSON
@click.pass_obj
def build(
    console: Console, /, checkpoint: Path, output: Path, as_json: bool, no_validate: bool, **options: Any
) -> None:
    """Build a bundle from CHECKPOINT: the graph, its proof against PyTorch, and a manifest."""
    from nemotrt.exporter.pipelines import build

    given = options | {"precision": options["precision"] or ""}
    config = BuildConfig(checkpoint=checkpoint, output=output, validate=not no_validate, **given)
    result = build.build(config, console)
    if as_json:
        click.echo(json.dumps(result, indent=2))
