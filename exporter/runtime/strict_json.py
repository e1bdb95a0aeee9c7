"""JSON objects and frozen dataclasses: a missing, unknown, duplicate or mistyped field is an error."""

import dataclasses
import json
import math
import os
from collections.abc import Callable
from enum import EnumType
from pathlib import Path
from types import NoneType, UnionType
from typing import Any, TypeVar, get_args, get_origin, get_type_hints

from nemotrt.exporter.errors import BundleError, ExportError

MAX_BYTES = 64 << 20
"""Far more than any JSON file of a bundle or checkpoint has."""

Entry = TypeVar("Entry")


def read_object(path: Path, error: Callable[[str], ExportError] = BundleError) -> dict[str, Any]:
    """The JSON object in a file; raises the given error, which names the file and the problem."""
    try:
        if path.stat().st_size > MAX_BYTES:
            raise error(f"{path} has {path.stat().st_size} bytes, over {MAX_BYTES}")
        return parse_object(path.read_bytes(), str(path), error)
    except OSError as cause:
        raise error(f"{path} cannot be read: {cause.strerror}") from cause


def parse_object(
    text: str | bytes, where: str, error: Callable[[str], ExportError] = BundleError
) -> dict[str, Any]:
    """The JSON object in a text (UTF-8); raises the given error, which names `where` and the problem."""
    try:
        entry = json.loads(str(text, "utf-8") if isinstance(text, bytes) else text, object_pairs_hook=_unique)
    except (ValueError, RecursionError) as cause:
        raise error(f"{where} is not valid JSON: {cause}") from cause
    if not isinstance(entry, dict):
        raise error(f"{where} is not a JSON object")
    return entry


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    fields: dict[str, Any] = {}
    for name, value in pairs:
        if name in fields:
            raise ValueError(f"duplicate key {name}")
        fields[name] = value
    return fields


def check_schema(fields: dict[str, Any], version: int, where: str, *, hint: str) -> None:
    """Raise BundleError unless the object has this `schema_version`; `hint` says how to replace an older file."""
    schema = fields.get("schema_version")
    if type(schema) is not int or schema < 1:
        raise BundleError(f"{where}: schema_version is not a number")
    if schema > version:
        raise BundleError(
            f"{where} has schema {schema}, this nemo-export reads {version}", hint="upgrade nemo-export"
        )
    if schema < version:
        raise BundleError(f"{where} was written by an older nemo-export", hint=hint)


def decode(kind: type[Entry], fields: dict[str, Any], file: str) -> Entry:
    """The fields as a dataclass; raises BundleError that names the file and the field, such as `files[3].size`."""
    try:
        return _dataclass(kind, fields, "")  # type: ignore[no-any-return]
    except ValueError as error:
        raise BundleError(f"{file}: {error}") from error


def _dataclass(kind: Any, value: Any, where: str) -> Any:
    if not isinstance(value, dict):
        raise ValueError(f"{where} is not an object")
    hints = get_type_hints(kind)
    prefix = f"{where}." if where else ""
    for name in sorted(value.keys() ^ hints.keys()):
        raise ValueError(f"{prefix}{name} is {'not known' if name in value else 'missing'}")
    return kind(**{name: _value(hint, value[name], prefix + name) for name, hint in hints.items()})


def _value(hint: Any, value: Any, where: str) -> Any:
    origin, arguments = get_origin(hint), get_args(hint)
    if origin is tuple:
        if not isinstance(value, list):
            raise ValueError(f"{where} is not a list")
        return tuple(_value(arguments[0], item, f"{where}[{i}]") for i, item in enumerate(value))
    if origin is dict:
        if not isinstance(value, dict):
            raise ValueError(f"{where} is not an object")
        return {name: _value(arguments[1], item, f"{where}.{name}") for name, item in value.items()}
    accepted = arguments if origin is UnionType else (hint,)
    entry = next((kind for kind in accepted if dataclasses.is_dataclass(kind)), None)
    if entry and not (value is None and NoneType in accepted):
        return _dataclass(entry, value, where)
    return _scalar(accepted, value, where)


def _scalar(accepted: tuple[Any, ...], value: Any, where: str) -> Any:
    if isinstance(kind := accepted[0], EnumType):
        if value not in list(kind):
            raise ValueError(f"{where} is {json.dumps(value)[:40]}, not one of {', '.join(kind)}")
        return kind(value)
    if accepted == (Path,) and type(value) is str:
        return Path(value)
    if accepted == (float,) and value is None:
        return math.nan  # JSON has no NaN; a report has null instead
    # bool is an int to isinstance, but not to JSON.
    if type(value) not in accepted:
        names = " or ".join(kind.__name__ for kind in accepted)
        raise ValueError(f"{where} is {json.dumps(value)[:40]}, not {names}")
    return value


def encode(entry: Any, *, indent: int | None = 2) -> str:
    """A dataclass as JSON text; `indent` None gives the canonical form, which is hashed."""
    fields = dataclasses.asdict(entry)
    if indent is None:
        return json.dumps(fields, sort_keys=True, separators=(",", ":"), ensure_ascii=True)
    return json.dumps(fields, indent=indent, ensure_ascii=False, default=os.fspath) + "\n"
