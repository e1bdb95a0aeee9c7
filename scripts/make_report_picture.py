#!/usr/bin/env python3
"""Writes docs/report.svg: the output of `nemo-export validate` in a terminal, as an SVG image.

The command in TITLE, with `--json > report.json`, writes the report to draw.
"""

from __future__ import annotations

import io
import json
import re
from pathlib import Path

import click
from rich.console import CONSOLE_SVG_FORMAT, Console

from nemotrt.exporter.commands import tables
from nemotrt.exporter.report import json_file

PICTURE = Path(__file__).resolve().parents[1] / "docs" / "report.svg"
TITLE = "nemo-export validate tiny.bundle --checkpoint examples/tiny --drift-steps 100"
FORMAT = re.sub(r"@font-face \{\{.*?\}\}\s*", "", CONSOLE_SVG_FORMAT, flags=re.DOTALL)
"""Rich's SVG template without its web fonts, so that the image loads nothing."""


@click.command()
@click.argument("report", type=click.Path(exists=True, path_type=Path))
def main(report: Path) -> None:
    """Write the image of REPORT, which `nemo-export validate --json` has printed."""
    fields = json.loads(report.read_text(encoding="utf-8"))
    screen = Console(record=True, width=tables.WIDTH, file=io.StringIO(), markup=False, highlight=False)
    for item in tables.report(json_file.parse(fields, str(report))):
        screen.print(item)
    image = screen.export_svg(title=TITLE, code_format=FORMAT, unique_id="report")
    PICTURE.write_text(image, encoding="utf-8")


if __name__ == "__main__":
    main()
