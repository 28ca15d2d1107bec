"""Durations in Go's syntax, as in Kubernetes: ``1h30m`` or ``90s``."""

from __future__ import annotations

import re
from dataclasses import dataclass
from datetime import timedelta
from fractions import Fraction

_UNITS = {"h": Fraction(3600), "m": Fraction(60), "s": Fraction(1), "ms": Fraction(1, 1000)}
_PART = re.compile(r"(?P<number>[0-9]{1,9}(?:\.[0-9]{1,9})?)(?P<unit>ms|h|m|s)", re.ASCII)
_MAX = timedelta(days=36_500)
_MAX_LENGTH = 64  # characters; the sum of fractions takes 5 µs for each part
_PERCENTAGE = re.compile(r"(?P<value>[0-9]{1,3})%", re.ASCII)


@dataclass(frozen=True, slots=True)
class Percentage:
    """A part of the lifetime of a certificate, from 1 to 99 percent."""

    value: int

    def __str__(self) -> str:
        return f"{self.value}%"


def parse_duration(text: str) -> timedelta:
    """Parse a Go duration with the units h, m, s and ms (time.ParseDuration); raises ValueError."""
    if text.startswith("-"):
        raise ValueError("is negative; use a positive duration, such as 1h30m")
    if len(text) > _MAX_LENGTH:
        raise ValueError(f"is {len(text)} characters long; a duration has at most {_MAX_LENGTH}")
    parts = list(_PART.finditer(text))
    if not parts or "".join(part[0] for part in parts) != text:
        raise ValueError("is not a duration; use numbers with the units h, m or s, such as 1h30m")
    seconds = sum(Fraction(part["number"]) * _UNITS[part["unit"]] for part in parts)
    if seconds > _MAX.total_seconds():
        raise ValueError("is longer than 100 years")
    return timedelta(seconds=float(seconds))


def parse_duration_or_percentage(text: str) -> timedelta | Percentage:
    """Parse a Go duration, or a percentage such as ``30%``; raises ValueError."""
    match = _PERCENTAGE.fullmatch(text)
    if match is None:
        return parse_duration(text)
    if not 0 < int(match["value"]) < 100:
        raise ValueError("is not a part of the lifetime; use 1% to 99%")
    return Percentage(int(match["value"]))


def format_duration(duration: timedelta) -> str:
    """Format a duration in Go's syntax, rounded to milliseconds: ``1h30m``, ``45s``, ``0s``, ``-5m``."""
    milliseconds = round(duration.total_seconds() * 1000)
    if milliseconds < 0:
        return "-" + format_duration(-duration)
    hours, rest = divmod(milliseconds, 3_600_000)
    minutes, rest = divmod(rest, 60_000)
    seconds = f"{rest / 1000:.3f}".rstrip("0").rstrip(".")
    text = (f"{hours}h" if hours else "") + (f"{minutes}m" if minutes else "") + (f"{seconds}s" if rest else "")
    return text or "0s"
