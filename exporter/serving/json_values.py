"""Values that a model writes as plain text, in the types that a tool's JSON schema declares."""

import json
from collections.abc import Mapping
from typing import Any

NAMES = {"true": True, "false": False, "null": None, "none": None}
"""In any case: templates show earlier calls with Python's `True` and `None`."""

TYPE_NAMES = {bool: "boolean", int: "integer", float: "number", str: "string", list: "array", dict: "object"}


def typed_value(text: str, schema: Mapping[str, Any], parameter: str) -> Any:
    """The value of a tool's parameter: what the text is as JSON if the schema declares that type, else the text.

    `schema` is the tool's `parameters`; a parameter that it does not describe is text.
    """
    types = _declared_types(_mapping(schema.get("properties")).get(parameter), schema)
    try:
        value = NAMES[text.lower()] if text.lower() in NAMES else json.loads(text)
        # Raises ValueError on infinity, NaN and half of a surrogate pair, which no answer can hold.
        json.dumps(value, ensure_ascii=False, allow_nan=False).encode()
    except (ValueError, RecursionError):
        return text
    kind = _type_name(value)
    if kind != "string" and (kind in types or (kind == "integer" and "number" in types)):
        return value
    if "integer" in types and isinstance(value, float) and value.is_integer():
        return int(value)
    return text


def _declared_types(declared: Any, root: Mapping[str, Any]) -> set[str]:
    """The types of a schema, of its alternatives, and of the values that it lists."""
    types: set[str] = set()
    pending, followed = [declared], {"#"}
    for entry in pending:
        schema = _mapping(entry)
        listed = schema.get("type")
        types.update(
            name for name in (listed if isinstance(listed, list) else [listed]) if isinstance(name, str)
        )
        types.update(map(_type_name, _list(schema.get("enum"))))
        if "const" in schema:
            types.add(_type_name(schema["const"]))
        for key in ("anyOf", "oneOf", "allOf"):
            pending += _list(schema.get(key))
        reference = schema.get("$ref")
        if isinstance(reference, str) and reference not in followed:
            followed.add(reference)
            pending.append(_resolved(reference, root))
    return types


def _resolved(reference: str, root: Mapping[str, Any]) -> Any:
    """What a reference such as `#/$defs/Color` names in the schema, None if nothing."""
    found: Any = root
    for part in reference.removeprefix("#/").split("/"):
        found = _mapping(found).get(part.replace("~1", "/").replace("~0", "~"))
    return found


def _mapping(value: Any) -> Mapping[str, Any]:
    return value if isinstance(value, Mapping) else {}


def _list(value: Any) -> list[Any]:
    return value if isinstance(value, list) else []


def _type_name(value: Any) -> str:
    return TYPE_NAMES.get(type(value), "null")
