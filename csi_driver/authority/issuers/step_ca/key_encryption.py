"""Decrypts what ``step crypto jwk create`` encrypts: JSON Web Encryption (RFC 7516) under a password (RFC 7518 section 4.8).

One algorithm each, as Smallstep's tools write no other: PBES2-HS256+A128KW for the key, A256GCM (or A128GCM) for the content.
"""

from __future__ import annotations

import base64
import binascii
import json
from dataclasses import dataclass
from typing import Any

from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.ciphers.aead import AESGCM
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.kdf.pbkdf2 import PBKDF2HMAC
from cryptography.hazmat.primitives.keywrap import InvalidUnwrap, aes_key_unwrap

from csi_driver.core.secret import Secret

_ALGORITHM = "PBES2-HS256+A128KW"
_KEY_BYTES = {"A256GCM": 32, "A128GCM": 16}
MOST_ITERATIONS = 5_000_000
"""Smallstep writes 100,000 to 600,000; the count comes with the input, and some seconds of a core are enough for it."""
_FEWEST_ITERATIONS = 1000
_MAX_BYTES = 64 * 1024


@dataclass(frozen=True, slots=True)
class _Parts:
    """The five parts of RFC 7516 section 7, decoded but for the protected header, whose text is authenticated as it stands."""

    protected: str
    encrypted_key: bytes
    iv: bytes
    ciphertext: bytes
    tag: bytes


def is_encrypted(text: str) -> bool:
    """True for what looks like a JWE in its compact or its JSON form; a plain JWK does not."""
    stripped = text.strip()
    return (stripped.count(".") == 4 and not stripped.startswith("{")) or '"ciphertext"' in stripped


def decrypt(text: str, password: Secret[bytes]) -> Secret[bytes]:
    """Takes a JWE in compact form (section 7.1) or flattened JSON form (section 7.2.2); it takes a fifth of a second of a core.

    Raises:
        ValueError: in words that follow "is": no JWE, one of another algorithm, or another password's.
    """
    if len(text) > _MAX_BYTES:
        raise ValueError(f"longer than {_MAX_BYTES} bytes")
    parts = _parts(text.strip())
    try:
        header = json.loads(_decoded(parts.protected))
        algorithm, content, count, salt = header["alg"], header["enc"], header["p2c"], _decoded(header["p2s"])
    except (ValueError, KeyError, TypeError, AttributeError):
        raise ValueError("not a JWE under a password: its header lacks alg, enc, p2c or p2s") from None
    if algorithm != _ALGORITHM or content not in _KEY_BYTES or "crit" in header or "zip" in header:
        raise ValueError(f"encrypted in another way than step does it ({_ALGORITHM} with {' or '.join(_KEY_BYTES)})")
    if not isinstance(count, int) or not _FEWEST_ITERATIONS <= count <= MOST_ITERATIONS or len(salt) < 8:
        raise ValueError(
            f"a JWE whose p2c is not from {_FEWEST_ITERATIONS} to {MOST_ITERATIONS}, or whose salt is short"
        )
    return _opened(parts, algorithm, _KEY_BYTES[content], salt, count, password)


def _opened(
    parts: _Parts, algorithm: str, key_bytes: int, salt: bytes, count: int, password: Secret[bytes]
) -> Secret[bytes]:
    # Section 4.8.1.1 of RFC 7518: the salt is the algorithm's name, a zero octet, and p2s.
    derivation = PBKDF2HMAC(SHA256(), 16, algorithm.encode("ascii") + b"\0" + salt, count)
    try:
        key = aes_key_unwrap(derivation.derive(password.reveal()), parts.encrypted_key)
        if len(key) != key_bytes or len(parts.iv) != 12 or len(parts.tag) != 16:
            raise ValueError("a JWE whose parts have wrong lengths")
        opened = AESGCM(key).decrypt(parts.iv, parts.ciphertext + parts.tag, parts.protected.encode("ascii"))
    except (InvalidUnwrap, InvalidTag):
        raise ValueError("encrypted with another password than the one given") from None
    return Secret(opened)


def _parts(text: str) -> _Parts:
    try:
        if text.startswith("{"):
            document: dict[str, Any] = json.loads(text)
            protected = document["protected"]
            fields = [document[name] for name in ("encrypted_key", "iv", "ciphertext", "tag")]
        else:
            protected, *fields = text.split(".")
        encrypted_key, iv, ciphertext, tag = (_decoded(field) for field in fields)
        return _Parts(str(protected), encrypted_key, iv, ciphertext, tag)
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        raise ValueError("not a JWE in compact or flattened JSON form") from None


def _decoded(text: str) -> bytes:
    """Base64url without padding (RFC 7515 section 2); raises ValueError."""
    try:
        return base64.b64decode(text + "=" * (-len(text) % 4), altchars=b"-_", validate=True)
    except (binascii.Error, UnicodeEncodeError):
        raise ValueError("not base64url") from None
