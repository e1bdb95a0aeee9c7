"""The validation report as JSON. A number that is not finite is null, and its gate has failed."""

import dataclasses
import json
import math
from typing import Any

from nemotrt.exporter.report.model import ValidationReport
from nemotrt.exporter.runtime.strict_json import check_schema, decode

NAME, PAGE = "report.json", "report.html"
SCHEMA_VERSION = 4


def as_json(report: ValidationReport) -> dict[str, Any]:
    """The report's fields, preceded by its verdict; each gate says whether it passed."""
    head = {"schema_version": SCHEMA_VERSION, "passed": report.passed, "verdict": report.verdict}
    gates = [dataclasses.asdict(gate) | {"passed": gate.passed} for gate in report.gates]
    return _finite(head | dataclasses.asdict(report) | {"gates": gates})  # type: ignore[no-any-return]


def text(report: ValidationReport) -> str:
    """The contents of `report.json`."""
    return json.dumps(as_json(report), indent=1, allow_nan=False, ensure_ascii=False) + "\n"


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: _finite(entry) for name, entry in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(entry) for entry in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def parse(fields: dict[str, Any], where: str) -> ValidationReport:
    """The report from which `as_json` made the fields.

    Raises BundleError for another schema version, and for a field that is missing or unknown.
    """
    check_schema(fields, SCHEMA_VERSION, where, hint="validate the bundle again")
    derived = ("schema_version", "passed", "verdict")
    fields = {name: value for name, value in fields.items() if name not in derived}
    if isinstance(fields.get("gates"), list):
        fields["gates"] = [{k: v for k, v in dict(gate).items() if k != "passed"} for gate in fields["gates"]]
    return decode(ValidationReport, fields, where)
