"""Durations in Go's syntax, as in Kubernetes: ``1h30m`` or ``90s``."""

from __future__ import annotations

import re
from datetime import timedelta
from fractions import Fraction

_UNITS = {"h": Fraction(3600), "m": Fraction(60), "s": Fraction(1), "ms": Fraction(1, 1000)}
_PART = re.compile(r"(?P<number>[0-9]{1,9}(?:\.[0-9]{1,9})?)(?P<unit>ms|h|m|s)", re.ASCII)
_MAX = timedelta(days=36_500)


def parse_duration(text: str) -> timedelta:
    """Parse a Go duration with the units h, m, s and ms (time.ParseDuration); raises ValueError."""
    if text.startswith("-"):
        raise ValueError("is negative; use a positive duration, such as 1h30m")
    parts = list(_PART.finditer(text))
    if not parts or "".join(part[0] for part in parts) != text:
        raise ValueError("is not a duration; use numbers with the units h, m or s, such as 1h30m")
    seconds = sum(Fraction(part["number"]) * _UNITS[part["unit"]] for part in parts)
    if seconds > _MAX.total_seconds():
        raise ValueError("is longer than 100 years")
    return timedelta(seconds=float(seconds))


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
