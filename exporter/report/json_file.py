"""A validation's report as JSON: written for machines, and read again by the version that it names.

A number that is not finite is null: JSON has none. A gate of such a value has not passed.
"""

from __future__ import annotations

import dataclasses
import json
import math
from pathlib import Path
from typing import Any

from nemotrt.exporter.errors import BundleError
from nemotrt.exporter.report.model import ValidationReport
from nemotrt.exporter.runtime.strict_json import decode, read_object

NAME, PAGE = "report.json", "report.html"
HEAD = ("schema_version", "passed", "verdict")
"""What stands first, and follows from the rest."""
SCHEMA_VERSION = 3
"""1 had no drift, and numbers that are no JSON."""


def as_json(report: ValidationReport) -> dict[str, Any]:
    """The verdict first, each gate with whether it passed."""
    fields = dataclasses.asdict(report)
    gates = [dataclasses.asdict(gate) | {"passed": gate.passed} for gate in report.gates]
    head = {"schema_version": SCHEMA_VERSION, "passed": report.passed, "verdict": report.verdict}
    return _finite(head | fields | {"gates": gates})  # type: ignore[no-any-return]


def text(report: ValidationReport) -> str:
    """The file's contents."""
    return json.dumps(as_json(report), indent=1, allow_nan=False, ensure_ascii=False) + "\n"


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: _finite(entry) for name, entry in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(entry) for entry in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def read(path: Path) -> ValidationReport:
    """The report in a file; raises BundleError on one of another schema, or a field that is missing or unknown."""
    return parsed(read_object(path), str(path))


def parsed(fields: dict[str, Any], where: str) -> ValidationReport:
    """The report that `as_json` made; as `read`."""
    version = fields.get("schema_version")
    if type(version) is not int:
        raise BundleError(f"{where} is no report: it has no schema_version")
    if version != SCHEMA_VERSION:
        newer = version > SCHEMA_VERSION
        raise BundleError(
            f"{where} has schema {version}, this nemo-export reads {SCHEMA_VERSION}",
            hint="upgrade nemo-export" if newer else "validate the bundle again",
        )
    own = {name: value for name, value in fields.items() if name not in HEAD}
    if isinstance(own.get("gates"), list):
        own["gates"] = [{k: v for k, v in dict(gate).items() if k != "passed"} for gate in own["gates"]]
    return decode(ValidationReport, own, where)
