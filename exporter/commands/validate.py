"""validate: a bundle against PyTorch, again."""

from __future__ import annotations

import json
from pathlib import Path

import click

from nemotrt.exporter.commands.arguments import BUNDLE, FOLDER, JSON, ExistingPath, command
from nemotrt.exporter.console import Console
from nemotrt.exporter.errors import ValidationError


@command("validate tiny.bundle --checkpoint examples/tiny")
@BUNDLE
@click.option(
    "--checkpoint",
    type=FOLDER,
    help="What the bundle was built from. Without it PyTorch runs with the bundle's own weights.",
)
@click.option(
    "--eval",
    "text",
    type=ExistingPath(),
    help="Text (.txt, .jsonl) on which to measure what FP8 costs; its limits are gates.",
)
@click.option(
    "--base",
    type=FOLDER,
    help="With --eval: the model before it was quantised. Default: the checkpoint, if the build quantised it.",
)
@JSON
@click.pass_obj
def validate(
    console: Console,
    bundle: Path,
    checkpoint: Path | None,
    text: Path | None,
    base: Path | None,
    as_json: bool,
) -> None:
    """Compare BUNDLE with PyTorch by every gate that a build has; exits with 6 if one fails."""
    from nemotrt.exporter.revalidation import revalidate
    from nemotrt.exporter.stages.bundle import as_json as report_fields

    report = revalidate(bundle, checkpoint, console, base=base, text=text)
    if as_json:
        click.echo(json.dumps(report_fields(report), indent=2))
    else:
        from nemotrt.exporter import tables

        tables.show(tables.report(report))
    if not report.passed:
        failed = sum(not gate.passed for gate in report.gates)
        raise ValidationError(
            f"{failed} of {len(report.gates)} gates failed" if report.gates else "nothing was compared",
            hint="do not ship it",
        )
