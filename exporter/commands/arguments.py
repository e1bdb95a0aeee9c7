"""Arguments and options that several commands share."""

import dataclasses
import difflib
import json
import logging
import os
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import click

from nemotrt.exporter.commands.console import Console
from nemotrt.exporter.config import KV_DTYPES, PRECISIONS, PRESETS, RUNTIMES, STATE_DTYPES, WEIGHTS

LEVELS = {"quiet": logging.ERROR, "verbose": logging.DEBUG}
"""A flag → the minimum level of the log records that are printed."""

HUB_NAME = re.compile(r"[\w-]+/[\w.-]+")
"""For example nvidia/NVIDIA-Nemotron-Nano-9B-v2."""


class Utf8Path(click.Path):
    """A path that is text: TensorRT, ONNX Runtime, JSON and reports take no other."""

    def __init__(self) -> None:
        super().__init__(path_type=Path)

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        """The value as a Path."""
        path = Path(os.fsdecode(value))
        try:
            str(path.absolute()).encode()
        except UnicodeEncodeError:
            self.fail(f"{path.absolute()} is not UTF-8; rename it", param, ctx)
        return super().convert(value, param, ctx)


class ExistingPath(Utf8Path):
    """A path that must exist; the error for a mistyped path suggests a similar one."""

    def __init__(self, *, is_folder: bool = False) -> None:
        super().__init__()
        self.file_okay = not is_folder

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        """The value as an existing Path."""
        path = Path(os.fsdecode(value))
        if not path.exists():
            similar = _similar(path)
            advice = f"; did you mean {similar}?" if similar else ""
            if not similar and HUB_NAME.fullmatch(str(path)):
                advice = "; nemo-export downloads no models: name a local folder"
            self.fail(f"{path} does not exist{advice}", param, ctx)
        if not self.file_okay and not path.is_dir():
            from nemotrt.exporter.checkpoint.other_formats import other_format

            other = other_format(path)
            self.fail(f"{other}; {other.hint}" if other else f"{path} is not a folder", param, ctx)
        if not path.is_dir() and not path.is_file():  # reading a pipe or a device may never end
            self.fail(f"{path} is not a regular file; copy its content to one", param, ctx)
        return super().convert(value, param, ctx)


class EvaluationText(ExistingPath):
    """A text file, or `default` for the built-in text."""

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        """The path of the file."""
        if value == "default":
            from nemotrt.exporter.quantization.text import EVALUATION, built_in

            return built_in(EVALUATION)
        return super().convert(value, param, ctx)


def _similar(path: Path) -> Path | None:
    """The path with its first missing component replaced by the most similar existing name."""
    for parent in reversed(path.parents):
        name, *rest = path.relative_to(parent).parts
        if (parent / name).exists():
            continue
        names = [entry.name for entry in parent.iterdir()] if parent.is_dir() else []
        matches = difflib.get_close_matches(name, names, n=1)
        return parent.joinpath(matches[0], *rest) if matches else None
    return None


def _switch(context: click.Context, parameter: click.Parameter, value: bool) -> None:
    console = context.ensure_object(Console)
    if value and parameter.name == "debug":
        console.debug = True
    elif value:
        level = LEVELS[str(parameter.name)]
        if console.level not in (logging.INFO, level):
            raise click.UsageError("--quiet and --verbose exclude each other")
        console.setLevel(level)


def _flag(*names: str, description: str) -> click.Option:
    return click.Option(names, is_flag=True, expose_value=False, callback=_switch, help=description)


OUTPUT_OPTIONS = (
    _flag("--quiet", "-q", description="Print errors only."),
    _flag("--verbose", "-v", description="Print more details."),
    _flag("--debug", description="Show the traceback of an error."),
)
"""Options of the program and of each command: they may precede the command's name or follow it."""


def command(example: str) -> Callable[[Callable[..., None]], click.Command]:
    """Make a function a command of the same name, with OUTPUT_OPTIONS; its help ends with the example."""

    def decorate(function: Callable[..., None]) -> click.Command:
        decorated = click.command(epilog=f"Example: nemo-export {example}")(function)
        decorated.params += OUTPUT_OPTIONS
        return decorated

    return decorate


def print_json(result: Any) -> None:
    """Print a result, a dataclass or a dict, as JSON on stdout."""
    click.echo(json.dumps(result, indent=2, default=dataclasses.asdict))


def _choice(name: str, values: Sequence[str], description: str) -> Callable[..., Any]:
    """An option whose default is the first value."""
    return click.option(name, type=click.Choice(values), default=values[0], help=description)


def _numbers(context: click.Context, parameter: click.Parameter, value: str) -> tuple[int, ...]:
    parts = [part.strip() for part in value.split(",") if part.strip()]
    if not all(part.isdigit() for part in parts):
        raise click.BadParameter(f"{value} is not a list of numbers such as 89,120")
    return tuple(int(part) for part in parts)


FOLDER, FILE = ExistingPath(is_folder=True), ExistingPath()
CHECKPOINT = click.argument("checkpoint", type=FOLDER)
BUNDLE = click.argument("bundle", type=FOLDER)
OUTPUT = click.option("--output", "-o", type=Utf8Path(), required=True, help="Folder to create.")
JSON = click.option("--json", "as_json", is_flag=True, help="Print the result as JSON on stdout.")
ENGINE = click.option(
    "--engine", is_flag=True, help="Run the bundle's TensorRT engine on this machine's GPU."
)
LAYERS = click.option(
    "--layers",
    default="",
    show_default=False,
    metavar="SELECTION",
    help="Use these layers only: a range (0:4), a list (0,3,7), or first-of-each, one layer of each kind.",
)
IGNORE_FIELD = click.option(
    "--ignore-field",
    "ignore_fields",
    multiple=True,
    metavar="NAME",
    help="Ignore this field of config.json, which would be refused, because the model computes the same without it."
    " May be repeated.",
)
ALLOW_ZERO_WEIGHTS = click.option(
    "--allow-zero-weights",
    is_flag=True,
    help="Accept weights that are zero where trained weights are not, as after a download that stopped.",
)
PRECISION = click.option(
    "--precision",
    type=click.Choice(PRECISIONS),
    callback=lambda _context, _parameter, value: value or "",
    help="Precision of the bundle. Default: the checkpoint's precision.",
)
RUNTIME = _choice(
    "--runtime",
    RUNTIMES,
    "Runtime that executes the bundle; auto selects the best one that this machine can build for.",
)
SMS = click.option(
    "--sm",
    "sms",
    callback=_numbers,
    default="",
    show_default=False,
    metavar="LIST",
    help="Compute capabilities for tensorrt-rtx, e.g. 89,120. Default: all that support the precision.",
)
WEIGHTS_PLACEMENT = _choice(
    "--weights",
    WEIGHTS,
    "Copy weights into the bundle, or link checkpoint files that need no conversion: as a clone (XFS, Btrfs), or else"
    " as a hard link. Changing a hard-linked file changes the bundle, and the onnx package refuses to load it.",
)
STATE_DTYPE = _choice("--state-dtype", STATE_DTYPES, "Data type of the recurrent (SSM) state.")
CALIBRATION = click.option(
    "--calibration",
    type=FILE,
    help='Text for FP8 calibration: .txt, or .jsonl with {"text": …} on each line. Default: a built-in text.',
)
PRESET = _choice(
    "--preset",
    PRESETS,
    "Modules that stay unquantized: conservative excludes attention, latent projections and Mamba layers;"
    " published quantizes Mamba layers too, like NVIDIA's published checkpoints.",
)
EXCLUDE = click.option(
    "--exclude",
    multiple=True,
    metavar="PATTERN",
    help="Leave more modules unquantized, e.g. '*.layers.4.mixer'. May be repeated.",
)
KV_DTYPE = _choice(
    "--kv-dtype",
    KV_DTYPES,
    "Data type of the KV cache; auto is fp8 if this command quantizes the model, else the checkpoint's choice.",
)
