"""The command line: an option becomes a config field, a command becomes one call. Heavy imports stay inside."""

from __future__ import annotations

import functools
import json
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click

from nemotrt.exporter.config import PRECISIONS, BuildConfig
from nemotrt.exporter.console import Console
from nemotrt.exporter.errors import ExportError

CHECKPOINT = click.argument("checkpoint", type=click.Path(path_type=Path))
BUNDLE = click.argument("bundle", type=click.Path(path_type=Path))
JSON = click.option("--json", "as_json", is_flag=True, help="Print the result as JSON on stdout.")


def reporting_errors(command: Callable[..., None]) -> Callable[..., None]:
    """Turn an ExportError into one line and its exit code, and Ctrl-C into 130."""

    @functools.wraps(command)
    def run(*arguments: Any, **options: Any) -> None:
        debug = click.get_current_context().find_root().params.get("debug", False)
        try:
            command(*arguments, **options)
        except ExportError as error:
            if debug:
                raise
            click.echo(f"error: {error}" + (f"\n  {error.hint}" if error.hint else ""), err=True)
            sys.exit(error.exit_code)
        except KeyboardInterrupt:
            click.echo("interrupted", err=True)
            sys.exit(128 + signal.SIGINT)

    return run


@click.group(context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100})
@click.version_option(package_name="nemo-export")
@click.option("--quiet", "-q", is_flag=True, help="Say nothing but errors.")
@click.option("--verbose", "-v", is_flag=True, help="Say more.")
@click.option("--debug", is_flag=True, help="Show the traceback of an error.")
@click.pass_context
def main(context: click.Context, quiet: bool, verbose: bool, debug: bool) -> None:
    """Export Nemotron-H and Nemotron 3 checkpoints to bundles that run, and are proved against PyTorch."""
    del debug  # read by reporting_errors
    context.obj = Console(quiet=quiet, verbose=verbose)


@main.command(
    epilog="Example: nemo-export build examples/tiny --output tiny.bundle",
)
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
@click.option("--force", is_flag=True, help="Replace an existing bundle.")
@click.option("--no-validate", is_flag=True, help="Do not compare with PyTorch; the manifest says so.")
@click.option(
    "--keep-failed", is_flag=True, help="Write the bundle even if a gate fails; the manifest says so."
)
@JSON
@click.pass_obj
@reporting_errors
def build(
    console: Console, checkpoint: Path, output: Path, as_json: bool, no_validate: bool, **options: Any
) -> None:
    """Build a bundle from CHECKPOINT: the graph, its proof against PyTorch, and a manifest."""
    from nemotrt.exporter import pipeline

    config = BuildConfig(
        checkpoint=checkpoint,
        output=output,
        validate=not no_validate,
        **{name: "" if value is None else value for name, value in options.items()},
    )
    result = pipeline.build(config, console)
    if as_json:
        click.echo(json.dumps(result, indent=2))
