"""The command `inspect`: describe a checkpoint, an ONNX file or a bundle."""

from pathlib import Path

import click

from nemotrt.exporter.commands.arguments import FILE, JSON, command, print_json


@command("inspect tiny.bundle")
@click.argument("path", type=FILE)
@click.option("--layer", type=int, help="Show the tensors and nodes of this layer; the first layer is 0.")
@JSON
def inspect(path: Path, layer: int | None, as_json: bool) -> None:
    """Describe the checkpoint, the ONNX file or the bundle at PATH, without reading weights."""
    from nemotrt.exporter.pipelines import inspect

    result = inspect.inspect(path, layer)
    if as_json:
        print_json(result)
    else:
        from nemotrt.exporter.commands import tables

        tables.show(tables.inspection(result))
