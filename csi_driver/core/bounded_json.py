"""Parses JSON from others. Bytes, values and depth are limited first, because 1 byte of JSON can become 60 bytes of objects."""

from __future__ import annotations

import json
import math
import re
from itertools import accumulate
from typing import Any

MAX_VALUES = 10_000
MAX_DEPTH = 32
_SURROGATE = re.compile(rb"\\u[dD][89a-fA-F]")
_BRACKETS = b"[{]}"
_NOT_BRACKETS = bytes(set(range(256)) - set(_BRACKETS))
_STEPS = {one: 1 if one in b"[{" else -1 for one in _BRACKETS}


def loads_bounded(data: bytes | str, *, max_bytes: int, max_values: int = MAX_VALUES) -> Any:
    """Return the value of a JSON text. Raises ValueError in words that follow a subject and quote nothing of the text.

    Keys count as values. NaN, numbers that are infinite as a float, and strings that UTF-8 can't encode are no JSON.
    """
    content = data.encode("utf-8", "surrogatepass") if isinstance(data, str) else data
    if len(content) > max_bytes:
        raise ValueError(f"is {len(content)} bytes long; expected at most {max_bytes}")
    _check_structure(content, max_values)
    try:
        value = _DECODER.decode(content.decode("utf-8"))
        if _SURROGATE.search(content):
            json.dumps(value, ensure_ascii=False).encode("utf-8")
    except ValueError:
        raise ValueError("is not JSON") from None  # The original exception contains the whole text
    return value


def _check_structure(content: bytes, max_values: int) -> None:
    if _count(content) <= max_values and content.count(b"[") + content.count(b"{") <= MAX_DEPTH:
        return
    # Strings can contain separators and brackets too. A backslash outside strings ends the parse, so this removes only escapes.
    parts = content.replace(b"\\\\", b"").replace(b'\\"', b"").split(b'"', 2 * max_values)
    structure = b"".join(parts[::2])
    if len(parts) > 2 * max_values or _count(structure) > max_values:
        raise ValueError(f"has more than {max_values} values")
    brackets = structure.translate(None, _NOT_BRACKETS)[: 2 * max_values]
    if max(accumulate(map(_STEPS.__getitem__, brackets)), default=0) > MAX_DEPTH:
        raise ValueError(f"is nested more than {MAX_DEPTH} levels deep")


def _count(content: bytes) -> int:
    """Return an upper bound of the number of values and keys: each but the first follows one of these."""
    return 1 + sum(map(content.count, (b",", b":", b"[", b"{")))


def _reject(constant: str) -> float:
    raise ValueError(f"{constant} is not JSON")


def _finite(text: str) -> float:
    number = float(text)
    return number if math.isfinite(number) else _reject(text)


_DECODER = json.JSONDecoder(parse_constant=_reject, parse_float=_finite)
