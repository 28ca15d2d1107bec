"""Texts for people."""

from __future__ import annotations

from datetime import UTC, datetime


def timestamp(moment: datetime | float) -> str:
    """Return a time in UTC, in whole seconds (RFC 3339). A number is a time in Unix seconds."""
    time = moment if isinstance(moment, datetime) else datetime.fromtimestamp(moment, UTC)
    return f"{time.astimezone(UTC):%Y-%m-%dT%H:%M:%SZ}"


def count(number: int, noun: str) -> str:
    """Return for example ``1 node`` or ``2 nodes``."""
    return f"{number} {noun}{'' if number == 1 else 's'}"


def shortened(text: str, maximum: int = 80) -> str:
    """Return the text, truncated if it has more characters than the maximum."""
    return text if len(text) <= maximum else text[: maximum - 3] + "..."


def shortened_to_bytes(text: str, maximum: int) -> str:
    """Return the text, truncated if it has more bytes in UTF-8 than the maximum."""
    data = text.encode()
    return text if len(data) <= maximum else data[: maximum - 3].decode(errors="ignore") + "..."


def quoted(text: str) -> str:
    """Return a user's text in quotes, with control characters escaped, and truncated if it is long."""
    return ascii(shortened(text))
