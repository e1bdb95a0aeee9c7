"""What a bundle says of itself, as text: each field's path and type, so that a change is seen beside its version."""

from __future__ import annotations

import dataclasses
from types import NoneType
from typing import Any, get_args, get_type_hints

from nemotrt.exporter.report import json_file
from nemotrt.exporter.report.model import ValidationReport
from nemotrt.exporter.runtime import manifest


def report_schema_text() -> str:
    """Every field of report.json, as `schema_text`; a number that is not finite is null."""
    lines = [
        f"schema_version {json_file.SCHEMA_VERSION}",
        "",
        "  passed: bool",
        *_fields(ValidationReport, "  "),
    ]
    gate = lines.index("  gates: list of Gate")
    return "\n".join([*lines[: gate + 1], "    passed: bool", *lines[gate + 1 :]]) + "\n"


def schema_text() -> str:
    """Every field of manifest.json, those of an object below it; `?` marks one that may be left out."""
    lines = [f"schema_version {manifest.SCHEMA_VERSION}", "", *_fields(manifest.Manifest, "  ")]
    lines += ["", f"roles: {', '.join(manifest.Role)}", f"verdicts: {', '.join(manifest.Verdict)}"]
    return "\n".join(lines) + "\n"


def _fields(kind: Any, indent: str) -> list[str]:
    lines = []
    hints = get_type_hints(kind)
    for field in dataclasses.fields(kind):
        optional = "" if field.default is dataclasses.MISSING else "?"
        lines.append(f"{indent}{field.name}{optional}: {_name(hints[field.name])}")
        for inner in (hints[field.name], *get_args(hints[field.name])):
            if dataclasses.is_dataclass(inner):
                lines += _fields(inner, indent + "  ")
    return lines


def _name(hint: Any) -> str:
    """The type as JSON has it: a tuple is a list."""
    if hint is NoneType:
        return "null"
    return getattr(hint, "__name__", str(hint)) if not get_args(hint) else _generic(hint)


def _generic(hint: Any) -> str:
    inner = [_name(argument) for argument in get_args(hint) if argument is not Ellipsis]
    if getattr(hint, "__name__", "") == "dict":
        return f"object of {inner[1]}"
    return f"list of {inner[0]}" if getattr(hint, "__name__", "") == "tuple" else " or ".join(inner)
