"""Validates documents against the schemas in docs (JSON Schema draft 2020-12), and changes documents for such tests."""

from __future__ import annotations

import copy
import re
from collections.abc import Iterator, Mapping
from typing import Any

from jsonschema import Draft202012Validator, ValidationError
from jsonschema.validators import extend

from csi_driver.core.config.document_reader import Path

REMOVED = object()


def _pattern(_: object, pattern: str, value: object, __: object) -> Iterator[ValidationError]:
    # In Python, a "$" at the end also matches before a final line break; in ECMA 262 it does not.
    if isinstance(value, str) and not re.search(re.sub(r"\$$", r"\\Z", pattern), value):
        yield ValidationError(f"{value!r} does not match {pattern!r}")


_Validator = extend(Draft202012Validator, {"pattern": _pattern})  # type: ignore[no-untyped-call]  # has no types


def valid(schema: Mapping[str, Any], value: object) -> bool:
    return bool(_Validator(schema).is_valid(value))


def places(value: object, path: Path = ()) -> Iterator[Path]:
    """Yield the path of each value in a document, except the document itself."""
    if path:
        yield path
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, part in items:
        yield from places(part, (*path, key))


def changed(document: dict[str, Any], path: Path, replacement: object) -> dict[str, Any]:
    """Return a copy of the document with the value at the path replaced, or removed for :data:`REMOVED`."""
    result = copy.deepcopy(document)
    part: Any = result
    for step in path[:-1]:
        part = part[step]
    if replacement is REMOVED:
        del part[path[-1]]
    else:
        part[path[-1]] = replacement
    return result
