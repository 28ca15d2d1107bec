"""The result or the expected exception of a call."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

T = TypeVar("T")
E = TypeVar("E", bound=Exception)


def outcome(call: Callable[[], T], error: type[E]) -> T | E:
    """Return the result of the call, or the exception of this type that it raises."""
    try:
        return call()
    except error as raised:
        return raised
