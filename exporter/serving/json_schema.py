"""What a JSON schema says about a value: the types that it may have, and whether any value can satisfy it."""

import json
from collections.abc import Iterator, Mapping
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


def has_finite_value(schema: Any) -> bool:
    """Whether a value can satisfy a valid schema without containing another value of the same kind, and so on forever.

    Contradictions, such as a minimum above the maximum, are not looked for.
    """
    references = {reference: _resolved(reference, _mapping(schema)) for reference in _references(schema)}
    finite: set[str] = set()
    while len(finite) < len(
        finite := {name for name, each in references.items() if _is_finite(each, finite)}
    ):
        pass
    return _is_finite(schema, finite)


def _references(schema: Any) -> Iterator[str]:
    """Every `$ref` in the schema."""
    if isinstance(schema, dict):
        if isinstance(reference := schema.get("$ref"), str):
            yield reference
        for value in schema.values():
            yield from _references(value)
    for value in _list(schema):
        yield from _references(value)


def _is_finite(schema: Any, finite: set[str]) -> bool:
    """Whether the schema has a finite value, if those references that are in `finite` have one."""
    schema = _mapping(schema)
    types = schema.get("type")
    choices = [_list(schema.get(key)) for key in ("anyOf", "oneOf") if key in schema]
    return (
        schema.get("$ref", "") in {"", *finite}
        and all(_is_finite(part, finite) for part in _list(schema.get("allOf")))
        and all(any(_is_finite(choice, finite) for choice in each) for each in choices)
        and any(
            all(_is_finite(part, finite) for part in _required_parts(name, schema))
            for name in (types if isinstance(types, list) else [types])
        )
    )


def _required_parts(type_name: Any, schema: Mapping[str, Any]) -> list[Any]:
    """The schemas of what a value of that type must contain."""
    if type_name == "object":
        properties = _mapping(schema.get("properties"))
        return [properties.get(name) for name in _list(schema.get("required"))]
    if type_name == "array":
        first, at_least = _list(schema.get("prefixItems")), schema.get("minItems", 0)
        return [*first[:at_least], *([schema.get("items")] if at_least > len(first) else [])]
    return []


def _resolved(reference: str, root: Mapping[str, Any]) -> Any:
    """What a reference such as `#/$defs/Color` names in the schema, None if nothing."""
    found: Any = root
    for part in filter(None, reference.removeprefix("#").split("/")):
        found = _mapping(found).get(part.replace("~1", "/").replace("~0", "~"))
    return found


def _mapping(value: Any) -> Mapping[str, Any]:
    return value if isinstance(value, Mapping) else {}


def _list(value: Any) -> list[Any]:
    return value if isinstance(value, list) else []


def _type_name(value: Any) -> str:
    return TYPE_NAMES.get(type(value), "null")
