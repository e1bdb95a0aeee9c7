#!/usr/bin/env python3
"""Writes docs/cli.md: every command's help, the exit codes, and shell completion."""

from __future__ import annotations

import signal
from pathlib import Path

import click

from nemotrt.exporter import errors
from nemotrt.exporter.cli import program

PAGE = Path(__file__).resolve().parents[1] / "docs" / "cli.md"
WIDTH = 100

HEAD = """\
<!-- Written by scripts/make_cli_docs.py: change the command's help, not this page. -->

# The command line

Results go to stdout and messages to stderr, so the output of `--json` can be piped. Progress bars are shown on
a terminal only. `--quiet`, `--verbose` and `--debug` are accepted before and after the command. An error is one line
that names the problem and one line that says what to do. `--debug` shows its traceback. Ctrl-C, SIGTERM
and SIGHUP end every command within a second. Control characters in names are shown as escapes.
"""

COMPLETION = """\
## Completion

Shells can complete commands, options, choices and paths:

```bash
eval "$(_NEMO_EXPORT_COMPLETE=bash_source nemo-export)"    # in ~/.bashrc
eval "$(_NEMO_EXPORT_COMPLETE=zsh_source nemo-export)"     # in ~/.zshrc
_NEMO_EXPORT_COMPLETE=fish_source nemo-export | source     # in ~/.config/fish/completions/nemo-export.fish
```
"""

OTHER_CODES = {
    0: "success",
    1: "a bug in nemo-export, or out of memory",
    128 + signal.SIGHUP: "ended by SIGHUP, like Ctrl-C",
    128 + signal.SIGINT: "interrupted by Ctrl-C; `build` reports if the same command can resume",
    128 + signal.SIGPIPE: "the reader of stdout closed it",
    128 + signal.SIGTERM: "ended by SIGTERM, like Ctrl-C",
}


def page() -> str:
    """The text of docs/cli.md."""
    sections = [HEAD, _help(program_context())]
    for name, command in program.commands.items():
        context = click.Context(command, parent=program_context(), info_name=name)
        sections += [f"## {name}\n", _help(context)]
    return "\n".join([*sections, _exit_codes(), COMPLETION])


def program_context() -> click.Context:
    """The program's context in a terminal of WIDTH columns."""
    return click.Context(program, info_name=program.name, terminal_width=WIDTH, **program.context_settings)


def _help(context: click.Context) -> str:
    return f"```console\n$ {context.command_path} --help\n{context.get_help()}\n```\n"


def _exit_codes() -> str:
    kinds = [
        kind for kind in vars(errors).values() if isinstance(kind, type) and kind is not errors.ExportError
    ]
    codes = OTHER_CODES | {kind.exit_code: _meaning(kind) for kind in kinds}
    rows = "".join(f"| {code} | {codes[code]} |\n" for code in sorted(codes))
    return f"## Exit codes\n\n| code | meaning |\n|---|---|\n{rows}"


def _meaning(kind: type) -> str:
    sentence = (kind.__doc__ or "").strip().rstrip(".")
    return sentence[0].lower() + sentence[1:]


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
