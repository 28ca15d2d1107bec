"""Base64url, and keys that administrators copy between tools, perhaps in an encoding that was not meant."""

from __future__ import annotations

import base64
import re

_HEX = re.compile(r"(?:[0-9a-f]{2}){16,}|(?:[0-9A-F]{2}){16,}", re.ASCII)
_URL_SAFE = str.maketrans("-_", "+/")
_MIN_TEXT = 16  # Shorter keys can consist of letters by accident


def encode_base64url(content: bytes) -> str:
    """Encode without padding (RFC 7515 section 2)."""
    return base64.urlsafe_b64encode(content).decode("ascii").rstrip("=")


def decode_base64(text: str) -> bytes:
    """Decode base64 or base64url, with or without padding and line breaks; raise ValueError."""
    compact = "".join(text.split()).translate(_URL_SAFE).rstrip("=")
    return base64.b64decode(compact + "=" * (-len(compact) % 4), validate=True)


def is_hexadecimal(text: str) -> bool:
    """Tell whether the text has only the characters of hexadecimal, which base64 of a key practically never has."""
    return _HEX.fullmatch(text) is not None


def is_encoded_twice(decoded: bytes) -> bool:
    """Tell whether a decoded key is base64 again. 16 random bytes are letters and digits once in 10**9 keys."""
    try:
        return len(decoded) >= _MIN_TEXT and len(decode_base64(decoded.decode("ascii"))) > 0
    except ValueError:
        return False
