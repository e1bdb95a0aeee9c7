"""What several commands have in common: paths that must exist, --json, and how much is said."""

from __future__ import annotations

import difflib
import logging
import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from nemotrt.exporter.commands.console import Console
from nemotrt.exporter.config import PRESETS, RUNTIMES, WEIGHTS

if TYPE_CHECKING:
    from click.shell_completion import CompletionItem

LEVELS = {"quiet": logging.ERROR, "verbose": logging.DEBUG}
"""A flag → the least level of the log records that are printed."""

HUB_NAME = re.compile(r"[\w-]+/[\w.-]+")
"""As nvidia/NVIDIA-Nemotron-Nano-9B-v2."""


class ExistingPath(click.Path):
    """A path that must exist; a mistyped one is refused with the name that was probably meant."""

    def __init__(self, *, is_folder: bool = False) -> None:
        super().__init__(path_type=Path)
        self._is_folder = is_folder

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        """The value as a Path."""
        path = Path(os.fsdecode(super().convert(value, param, ctx)))
        if not path.exists():
            near = _near(path)
            why = f"; did you mean {near}?" if near else ""
            if not near and HUB_NAME.fullmatch(str(path)):
                why = "; if it is a name on a hub: nothing is downloaded here, name a local folder"
            self.fail(f"{path} does not exist{why}", param, ctx)
        if self._is_folder and not path.is_dir():
            self.fail(f"{path} is not a folder", param, ctx)
        return path

    def shell_complete(
        self, ctx: click.Context, param: click.Parameter, incomplete: str
    ) -> list[CompletionItem]:
        """Tell the shell which of its paths may be meant."""
        from click.shell_completion import CompletionItem

        return [CompletionItem(incomplete, type="dir" if self._is_folder else "file")]


class EvaluationText(ExistingPath):
    """A text file, or `default` for the built-in text."""

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        """The file's path."""
        if value == "default":
            from nemotrt.exporter.quantization.text import evaluation_text

            return evaluation_text()
        return super().convert(value, param, ctx)


def _near(path: Path) -> Path | None:
    """The path with its first name that does not exist replaced by one that does and looks like it."""
    for parent in reversed(path.parents):
        name, *rest = path.relative_to(parent).parts
        if (parent / name).exists():
            continue
        names = [entry.name for entry in parent.iterdir()] if parent.is_dir() else []
        found = difflib.get_close_matches(name, names, n=1)
        return parent.joinpath(found[0], *rest) if found else None
    return None


def _switch(context: click.Context, parameter: click.Parameter, value: bool) -> None:
    if not value:
        return
    console = context.ensure_object(Console)
    if parameter.name == "debug":
        console.debug = True
    elif console.level != logging.INFO and console.level != LEVELS[str(parameter.name)]:
        raise click.UsageError("--quiet and --verbose exclude each other")
    else:
        console.setLevel(LEVELS[str(parameter.name)])


def _flag(*names: str, says: str) -> click.Option:
    return click.Option(names, is_flag=True, expose_value=False, callback=_switch, help=says)


TALK = (
    _flag("--quiet", "-q", says="Say nothing but errors."),
    _flag("--verbose", "-v", says="Say more."),
    _flag("--debug", says="Show the traceback of an error."),
)
"""Options of the program and of each command: they may stand before the command's name or after it."""


def command(example: str) -> Callable[[Callable[..., None]], click.Command]:
    """A command named for its function, with the options of TALK; its help ends with the example."""

    def decorate(function: Callable[..., None]) -> click.Command:
        made = click.command(epilog=f"Example: nemo-export {example}")(function)
        made.params += TALK
        return made

    return decorate


FOLDER = ExistingPath(is_folder=True)
CHECKPOINT = click.argument("checkpoint", type=FOLDER)
BUNDLE = click.argument("bundle", type=FOLDER)
JSON = click.option("--json", "as_json", is_flag=True, help="Print the result as JSON on stdout.")
LAYERS = click.option(
    "--layers",
    default="",
    metavar="CHOICE",
    help="Of these layers only: a range as 0:4, a list as 0,3,7, or first-of-each, one of each kind.",
)


def _numbers(context: click.Context, parameter: click.Parameter, value: str) -> tuple[int, ...]:
    parts = [part.strip() for part in value.split(",") if part.strip()]
    if not all(part.isdigit() for part in parts):
        raise click.BadParameter(f"{value} is no list of numbers, as 89,120")
    return tuple(int(part) for part in parts)


RUNTIME = click.option(
    "--runtime",
    type=click.Choice(RUNTIMES),
    default="auto",
    show_default=True,
    help="What is to run the bundle; auto takes the best that this machine can build, and says so.",
)
SMS = click.option(
    "--sm",
    "sms",
    callback=_numbers,
    default="",
    metavar="LIST",
    help="GPU generations for tensorrt-rtx, as 89,120; default: all that the precision runs on.",
)
WEIGHTS_LIE = click.option(
    "--weights",
    type=click.Choice(WEIGHTS),
    default="copy",
    show_default=True,
    help="Copy weights into the bundle, or link the checkpoint's files where they hold them as wanted: the bundle"
    " is as good as those files then.",
)
CALIBRATION = click.option(
    "--calibration",
    type=ExistingPath(),
    help='Text to calibrate FP8 on: .txt, or .jsonl with {"text": …} a line. Default: a built-in text.',
)
PRESET = click.option(
    "--preset",
    type=click.Choice(PRESETS),
    default=PRESETS[0],
    show_default=True,
    help="What FP8 leaves out, as NVIDIA does: attention, latent projections and Mamba layers (conservative), or as in"
    " its published checkpoints, whose Mamba layers are FP8 too.",
)
EXCLUDE = click.option(
    "--exclude",
    multiple=True,
    metavar="PATTERN",
    help="Leave these modules unquantized too, as '*.layers.4.mixer'; more than once for more.",
)
KV_DTYPE = click.option(
    "--kv-dtype",
    type=click.Choice(["auto", "fp8", "bf16"]),
    default="auto",
    show_default=True,
    help="Of the KV cache; auto is fp8 where the model is quantized here, else what its FP8 checkpoint says.",
)
