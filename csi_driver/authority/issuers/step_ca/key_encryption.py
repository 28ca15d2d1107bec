"""Decrypts keys that ``step crypto jwk create`` encrypts: JWE (RFC 7516) with a password (RFC 7518 section 4.8).

Only the algorithms that Smallstep's tools use are supported. JOSE libraries are no alternative: Smallstep derives keys with
600,000 iterations, while joserfc allows at most 300,000 and jwcrypto has only a limit for the whole process.
"""

from __future__ import annotations

import base64
import json

from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.ciphers.aead import AESGCM
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.kdf.pbkdf2 import PBKDF2HMAC
from cryptography.hazmat.primitives.keywrap import InvalidUnwrap, aes_key_unwrap

from csi_driver.core.secret import Secret

_ALGORITHM = "PBES2-HS256+A128KW"
_KEY_BYTES = {"A256GCM": 32, "A128GCM": 16}
MIN_ITERATIONS, MAX_ITERATIONS = 1000, 5_000_000
"""The input contains the number of iterations, so it must be bounded: the maximum takes some seconds of a core."""
_MAX_BYTES = 64 * 1024


def is_encrypted(text: str) -> bool:
    """Return True for text that looks like a JWE in compact or JSON form, and not like a plain JWK."""
    stripped = text.strip()
    return (stripped.count(".") == 4 and not stripped.startswith("{")) or '"ciphertext"' in stripped


def decrypt(text: str, password: Secret[bytes]) -> Secret[bytes]:
    """Decrypt a JWE in compact (section 7.1) or flattened JSON form (section 7.2.2). It takes about 0.2 s of a core.

    Raises:
        ValueError: in words that follow "is", if it is not a JWE, uses another algorithm, or has another password.
    """
    if len(text) > _MAX_BYTES:
        raise ValueError(f"longer than {_MAX_BYTES} bytes")
    protected, encrypted_key, iv, ciphertext, tag = _split(text.strip())
    try:
        header = json.loads(_decode(protected))
        algorithm, encryption, iterations = header["alg"], header["enc"], header["p2c"]
        salt = _decode(header["p2s"])
    except (ValueError, KeyError, TypeError, AttributeError):
        raise ValueError("not a JWE with a password: its header lacks alg, enc, p2c or p2s") from None
    if algorithm != _ALGORITHM or encryption not in _KEY_BYTES or "crit" in header or "zip" in header:
        raise ValueError(
            f"encrypted with an unsupported algorithm; expected {_ALGORITHM} with {' or '.join(_KEY_BYTES)}"
        )
    if not isinstance(iterations, int) or not MIN_ITERATIONS <= iterations <= MAX_ITERATIONS or len(salt) < 8:
        raise ValueError(
            f"a JWE whose p2c is not from {MIN_ITERATIONS} to {MAX_ITERATIONS}, or whose salt is too short"
        )
    # RFC 7518 section 4.8.1.1: the salt is the algorithm's name, a zero octet, and p2s.
    derivation = PBKDF2HMAC(SHA256(), 16, algorithm.encode("ascii") + b"\0" + salt, iterations)
    try:
        key = aes_key_unwrap(derivation.derive(password.reveal()), encrypted_key)
        if len(key) != _KEY_BYTES[encryption] or len(iv) != 12 or len(tag) != 16:
            raise ValueError("a JWE whose parts have wrong lengths")
        return Secret(AESGCM(key).decrypt(iv, ciphertext + tag, protected.encode("ascii")))
    except (InvalidUnwrap, InvalidTag):
        raise ValueError("encrypted with another password") from None


def _split(text: str) -> tuple[str, bytes, bytes, bytes, bytes]:
    """Return the five parts of RFC 7516 section 7; the header stays encoded, because its encoded form is authenticated."""
    try:
        if text.startswith("{"):
            document = json.loads(text)
            names = ("protected", "encrypted_key", "iv", "ciphertext", "tag")
            protected, *fields = (document[name] for name in names)
        else:
            protected, *fields = text.split(".")
        encrypted_key, iv, ciphertext, tag = map(_decode, fields)
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        raise ValueError("not a JWE in compact or flattened JSON form") from None
    return str(protected), encrypted_key, iv, ciphertext, tag


def _decode(text: str) -> bytes:
    """Decode base64url without padding (RFC 7515 section 2); raise ValueError, of which binascii.Error is a subclass."""
    if "+" in text or "/" in text:  # Python before 3.15 accepts these too
        raise ValueError("not base64url")
    return base64.b64decode(text + "=" * (-len(text) % 4), altchars=b"-_", validate=True)
