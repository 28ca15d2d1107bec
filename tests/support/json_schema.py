"""Validates documents against the schemas in docs (JSON Schema draft 2020-12)."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import Any

from jsonschema import Draft202012Validator, ValidationError
from jsonschema.validators import extend


def _pattern(_: object, pattern: str, value: object, __: object) -> Iterator[ValidationError]:
    # In Python, a "$" at the end also matches before a final line break; in ECMA 262 it does not.
    if isinstance(value, str) and not re.search(re.sub(r"\$$", r"\\Z", pattern), value):
        yield ValidationError(f"{value!r} does not match {pattern!r}")


_Validator = extend(Draft202012Validator, {"pattern": _pattern})  # type: ignore[no-untyped-call]  # has no types


def valid(schema: Mapping[str, Any], value: object) -> bool:
    """Return whether the value fits the schema."""
    return bool(_Validator(schema).is_valid(value))
