"""The entry point of the command line: its commands, and how errors are printed."""

import os
import sys
from types import TracebackType
from typing import Any, NoReturn

import click

from nemotrt.exporter import interrupts
from nemotrt.exporter.commands.arguments import OUTPUT_OPTIONS
from nemotrt.exporter.commands.build import build
from nemotrt.exporter.commands.check import check
from nemotrt.exporter.commands.console import Console
from nemotrt.exporter.commands.failures import check_address_space, explain
from nemotrt.exporter.commands.generate import generate
from nemotrt.exporter.commands.inspect import inspect
from nemotrt.exporter.commands.quantize import quantize
from nemotrt.exporter.commands.terminal import printable, use_robust_streams
from nemotrt.exporter.commands.validate import validate
from nemotrt.exporter.commands.verify import verify
from nemotrt.exporter.errors import ExportError, UsageError


class Program(click.Group):
    """A group that turns every error of its commands into one line and an exit code."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        """The commands in the order in which a user needs them."""
        return list(self.commands)

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        """The command that the arguments name, if this process may map the libraries that it needs."""
        name, command, rest = super().resolve_command(ctx, args)
        check_address_space(name or "")
        return name, command, rest

    def invoke(self, ctx: click.Context) -> Any:
        """Run the command; with --debug, errors are raised instead of printed."""
        try:
            with interrupts.handled(), ctx.ensure_object(Console).attached():
                return super().invoke(ctx)
        except ExportError as error:
            _end(ctx, error, str(error), error.hint, error.exit_code)
        except click.UsageError as error:
            command = error.ctx.command_path if error.ctx else ctx.command_path
            _end(ctx, error, error.format_message(), f"see {command} --help", UsageError.exit_code)
        except KeyboardInterrupt as error:
            _end(ctx, error, "interrupted", "", interrupts.exit_code(error))
        except (AttributeError, ImportError, MemoryError, OSError, RuntimeError, SystemError) as error:
            if explained := explain(error, f"{ctx.command_path} {ctx.invoked_subcommand}"):
                _end(ctx, error, str(explained), explained.hint, explained.exit_code)
            if not isinstance(error, OSError) or error.errno is None:
                raise
            where = f"{error.filename}: " if error.filename else ""
            _end(ctx, error, f"{where}{error.strerror}", "", UsageError.exit_code)


def _end(ctx: click.Context, error: BaseException, message: str, hint: str, code: int) -> NoReturn:
    is_mistyped = isinstance(error, click.UsageError)  # its traceback would show click's parser
    if ctx.ensure_object(Console).debug and not is_mistyped:
        raise error
    prefix = "" if code in interrupts.EXIT_CODES else "error: "
    # The name of a tensor or a field may hold line breaks.
    line, advice = (" ".join(text.splitlines()) for text in (prefix + message, hint))
    click.echo(printable(line + (f"\n  {advice}" if advice else "")), err=True)
    raise click.exceptions.Exit(code) from error


@click.group(
    cls=Program,
    name="nemo-export",
    params=list(OUTPUT_OPTIONS),
    commands=[check, quantize, build, inspect, generate, validate, verify],
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100, "show_default": True},
)
@click.version_option(package_name="nemo-export")
def program() -> None:
    """Export Nemotron-H and Nemotron 3 checkpoints to deployable bundles, numerically validated against PyTorch."""


def main() -> None:
    """Run the program as a process, which prints internal errors in one line and ends at once on a signal."""
    use_robust_streams()
    if "--debug" not in sys.argv:
        sys.excepthook = _report_internal_error
    try:
        program()
    except SystemExit as end:
        if isinstance(end.code, int) and end.code in interrupts.EXIT_CODES:
            # PyTorch's libraries take up to a second to unload.
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(end.code)
        raise


def _report_internal_error(kind: type[BaseException], error: BaseException, _: TracebackType | None) -> None:
    first = next(iter(str(error).splitlines()), "")
    click.echo(printable(f"error: internal error of nemo-export: {kind.__name__}: {first}"), err=True)
    click.echo("  please report it with the output of --debug", err=True)
