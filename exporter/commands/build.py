"""The command `build`: export a checkpoint to a bundle."""

from typing import Any

import click

from nemotrt.exporter.commands import arguments
from nemotrt.exporter.commands.console import Console
from nemotrt.exporter.config import BuildConfig


@arguments.command("build examples/tiny --output tiny.bundle")
@arguments.CHECKPOINT
@arguments.OUTPUT
@arguments.PRECISION
@arguments.RUNTIME
@arguments.SMS
@click.option("--max-tokens", default=2048, help="Maximum tokens per step, over all sequences.")
@click.option("--max-sequences", default=16, help="Maximum sequences per step.")
@click.option("--max-context", default=8192, help="Maximum tokens per sequence.")
@click.option("--page-size", default=128, help="Tokens per page of the KV cache.")
@arguments.STATE_DTYPE
@arguments.LAYERS
@arguments.IGNORE_FIELD
@arguments.ALLOW_ZERO_WEIGHTS
@arguments.CALIBRATION
@arguments.PRESET
@arguments.EXCLUDE
@arguments.KV_DTYPE
@arguments.WEIGHTS_PLACEMENT
@click.option("--force", is_flag=True, help="Replace an existing bundle.")
@click.option("--no-validate", is_flag=True, help="Skip the comparison with PyTorch; the manifest says so.")
@click.option(
    "--keep-failed", is_flag=True, help="Write the bundle even if a gate fails; the manifest says so."
)
@arguments.JSON
@click.pass_obj
def build(console: Console, /, no_validate: bool, as_json: bool, **options: Any) -> None:
    """Build a bundle from CHECKPOINT and validate it against PyTorch.

    A bundle is a folder with an ONNX graph, its weights, TensorRT engines, a validation report and a manifest.
    """
    from nemotrt.exporter.pipelines import build

    result = build.build(BuildConfig(validate=not no_validate, **options), console)
    if as_json:
        arguments.print_json(result)
