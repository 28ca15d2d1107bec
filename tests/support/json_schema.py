"""As much of JSON Schema (draft 2020-12) as our own schema uses; what it does not know fails the test that meets it."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from typing import Any

_TYPES: Mapping[str, type | tuple[type, ...]] = {
    "object": dict,
    "array": list,
    "string": str,
    "null": type(None),
    "boolean": bool,
}
_SAYS_NOTHING = {"$schema", "$id", "$defs", "title", "description"}


def valid(schema: Mapping[str, Any], value: object, root: Mapping[str, Any] | None = None) -> bool:
    """True when the value fits the schema."""
    top = root or schema
    return all(_KEYWORDS[keyword](schema, value, top) for keyword in schema if keyword not in _SAYS_NOTHING)


def _reference(schema: Mapping[str, Any], value: object, root: Mapping[str, Any]) -> bool:
    return valid(root["$defs"][schema["$ref"].removeprefix("#/$defs/")], value, root)


def _type(schema: Mapping[str, Any], value: object, _: Mapping[str, Any]) -> bool:
    names = schema["type"] if isinstance(schema["type"], list) else [schema["type"]]
    return any(isinstance(value, _TYPES[name]) for name in names)


def _properties(schema: Mapping[str, Any], value: object, root: Mapping[str, Any]) -> bool:
    parts = schema["properties"]
    return not isinstance(value, dict) or all(
        valid(parts[name], value[name], root) for name in value.keys() & parts.keys()
    )


def _additional(schema: Mapping[str, Any], value: object, root: Mapping[str, Any]) -> bool:
    others, known = schema["additionalProperties"], schema.get("properties", {})
    return not isinstance(value, dict) or all(
        others is not False and valid(others, value[name], root) for name in value.keys() - known.keys()
    )


def _property_names(schema: Mapping[str, Any], value: object, root: Mapping[str, Any]) -> bool:
    return not isinstance(value, dict) or all(valid(schema["propertyNames"], name, root) for name in value)


def _required(schema: Mapping[str, Any], value: object, _: Mapping[str, Any]) -> bool:
    return not isinstance(value, dict) or value.keys() >= set(schema["required"])


def _items(schema: Mapping[str, Any], value: object, root: Mapping[str, Any]) -> bool:
    return not isinstance(value, list) or all(valid(schema["items"], item, root) for item in value)


def _pattern(schema: Mapping[str, Any], value: object, _: Mapping[str, Any]) -> bool:
    # A "$" at the end is before a last line break too in Python, but not in ECMA 262.
    pattern = re.sub(r"\$$", r"\\Z", schema["pattern"])
    return not isinstance(value, str) or re.search(pattern, value) is not None


def _count(how_many: Callable[[int, int], bool], keyword: str) -> Callable[..., bool]:
    def fits(schema: Mapping[str, Any], value: object, root: Mapping[str, Any]) -> bool:
        return how_many(sum(valid(one, value, root) for one in schema[keyword]), len(schema[keyword]))

    return fits


_KEYWORDS: Mapping[str, Callable[[Mapping[str, Any], object, Mapping[str, Any]], bool]] = {
    "$ref": _reference,
    "type": _type,
    "properties": _properties,
    "additionalProperties": _additional,
    "propertyNames": _property_names,
    "maxProperties": lambda schema, value, _: not isinstance(value, dict) or len(value) <= schema["maxProperties"],
    "maxLength": lambda schema, value, _: not isinstance(value, str) or len(value) <= schema["maxLength"],
    "required": _required,
    "items": _items,
    "maxItems": lambda schema, value, _: not isinstance(value, list) or len(value) <= schema["maxItems"],
    "minItems": lambda schema, value, _: not isinstance(value, list) or len(value) >= schema["minItems"],
    "enum": lambda schema, value, _: value in schema["enum"],
    "pattern": _pattern,
    "oneOf": _count(lambda fitting, _: fitting == 1, "oneOf"),
    "anyOf": _count(lambda fitting, _: fitting >= 1, "anyOf"),
    "allOf": _count(lambda fitting, all_: fitting == all_, "allOf"),
}
