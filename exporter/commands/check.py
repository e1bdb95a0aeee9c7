"""The command `check`: predict a build without writing anything."""

from pathlib import Path
from typing import Any

import click

from nemotrt.exporter.commands import arguments
from nemotrt.exporter.commands.console import Console
from nemotrt.exporter.errors import CheckpointError, UsageError


@arguments.command("check examples/tiny --deep")
@click.argument("checkpoint", type=arguments.FOLDER, required=False)
@arguments.PRECISION
@arguments.RUNTIME
@arguments.SMS
@click.option(
    "--deep", is_flag=True, help="Also read all weights, to find NaN, infinity, overflow and zeros."
)
@click.option(
    "--config", "config_file", type=arguments.FILE, help="Check this config.json, without a checkpoint."
)
@click.option(
    "--tensors",
    "tensors_file",
    type=arguments.FILE,
    help="With --config: a JSON table {name: [dtype, shape]}; expert 0 may represent all experts.",
)
@arguments.LAYERS
@arguments.IGNORE_FIELD
@arguments.ALLOW_ZERO_WEIGHTS
@arguments.WEIGHTS_PLACEMENT
@arguments.JSON
@click.pass_obj
def check(
    console: Console,
    /,
    checkpoint: Path | None,
    config_file: Path | None,
    tensors_file: Path | None,
    layers: str,
    ignore_fields: tuple[str, ...],
    as_json: bool,
    **options: Any,
) -> None:
    """Report what a build of CHECKPOINT would produce, need and reject.

    Reads the configuration and the tensor headers, and writes nothing; exits with 3 if a build would reject them.
    """
    from nemotrt.exporter.pipelines import check as checks

    if (checkpoint is None) == (config_file is None) or (tensors_file and not config_file):
        raise UsageError(
            "check needs either a checkpoint, or --config with or without --tensors",
            hint="see nemo-export check --help",
        )
    if options["allow_zero_weights"] and not options["deep"]:
        raise UsageError(
            "--allow-zero-weights has no effect without --deep", hint="add --deep, which reads the weights"
        )
    if checkpoint is not None:
        with console.stage("read", f"{checkpoint.resolve().name}, headers"):
            headers = checks.read_headers(checkpoint, layers, ignore_fields)
    else:
        assert config_file
        if options["deep"]:
            raise UsageError("--deep reads weights, and --config names none", hint="name a checkpoint folder")
        files = [file.name for file in (config_file, tensors_file) if file]
        with console.stage("read", ", ".join(files)):
            headers = checks.read_config(config_file, tensors_file, layers, ignore_fields)
    result = checks.check(headers, progress=console, **options)
    if as_json:
        arguments.print_json(result.as_dict())
    else:
        from nemotrt.exporter.commands import tables

        tables.show(tables.check(result))
    if result.problems:
        number = len(result.problems)
        raise CheckpointError(f"{number} problem{'s' * (number > 1)} would stop a build of {result.name}")
