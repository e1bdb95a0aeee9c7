#!/usr/bin/env python3
"""Writes docs/report.svg: the output of `nemo-export validate` in a terminal, as an SVG image."""

from __future__ import annotations

import io
import re
from pathlib import Path

import click
from rich.console import CONSOLE_SVG_FORMAT
from rich.console import Console as RichConsole

from nemotrt.exporter.commands import tables
from nemotrt.exporter.pipelines.validate import revalidate
from nemotrt.exporter.validation.request import ValidationRequest

PICTURE = Path(__file__).resolve().parents[1] / "docs" / "report.svg"
FORMAT = re.sub(r"@font-face \{\{.*?\}\}\s*", "", CONSOLE_SVG_FORMAT, flags=re.DOTALL)
"""Rich's SVG template without its web fonts, so that the image loads nothing."""


@click.command()
@click.argument("bundle", type=click.Path(exists=True, path_type=Path))
@click.option("--checkpoint", type=click.Path(exists=True, path_type=Path), required=True)
def main(bundle: Path, checkpoint: Path) -> None:
    """Validate BUNDLE and write the image of its report."""
    report = revalidate(ValidationRequest(bundle, checkpoint))
    screen = RichConsole(record=True, width=100, file=io.StringIO(), markup=False, highlight=False)
    for item in tables.report(report):
        screen.print(item)
    title = f"nemo-export validate {bundle.name} --checkpoint {checkpoint}"
    PICTURE.write_text(
        screen.export_svg(title=title, code_format=FORMAT, unique_id="report"), encoding="utf-8"
    )


if __name__ == "__main__":
    main()
