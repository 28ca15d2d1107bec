"""For tests of the form "this, or that error and no other"."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

T = TypeVar("T")
E = TypeVar("E", bound=Exception)


def outcome(call: Callable[[], T], error: type[E]) -> T | E:
    """What the call returns, or the error of that type that it raises; any other error passes through."""
    try:
        return call()
    except error as raised:
        return raised
