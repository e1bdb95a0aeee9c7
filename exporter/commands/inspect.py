"""inspect: what a checkpoint, an ONNX file or a bundle holds."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import click

from nemotrt.exporter.commands.arguments import JSON, ExistingPath, command


@command("inspect tiny.bundle")
@click.argument("path", type=ExistingPath())
@click.option("--layer", type=int, help="Show the tensors and nodes of this layer, the first being 0.")
@JSON
def inspect(path: Path, layer: int | None, as_json: bool) -> None:
    """Show what PATH holds: a checkpoint's folder, an ONNX file, or a bundle. No weight is read."""
    from nemotrt.exporter.pipelines import inspect

    found = inspect.inspect(path, layer)
    if as_json:
        click.echo(json.dumps(dataclasses.asdict(found), indent=2))
        return
    from nemotrt.exporter.commands import tables

    tables.show(tables.inspection(found))
