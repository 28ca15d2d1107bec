"""The key of a JWK provisioner, which may be encrypted, and the one-time tokens that it signs.

``step crypto jwk create`` encrypts keys as JWE (RFC 7516) with a password (RFC 7518 section 4.8). JOSE libraries are no
alternative: Smallstep derives keys with 600,000 iterations, joserfc allows 300,000, and jwcrypto's limit is global.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import Any

import jwt
from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.ciphers.aead import AESGCM
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.kdf.pbkdf2 import PBKDF2HMAC
from cryptography.hazmat.primitives.keywrap import InvalidUnwrap, aes_key_unwrap

from csi_driver.authority.issuers.key_encoding import encode_base64url
from csi_driver.core.bounded_json import loads_bounded
from csi_driver.core.identity import decode_base64url
from csi_driver.core.secret import Secret

_ALGORITHM = "PBES2-HS256+A128KW"
_KEY_BYTES = {"A256GCM": 32, "A128GCM": 16}
MIN_ITERATIONS, MAX_ITERATIONS = 1000, 5_000_000  # From the input; the maximum takes some seconds of a core
_MAX_BYTES = 64 * 1024
TOKEN_LIFETIME = timedelta(minutes=1)  # step-ca tolerates one more minute of difference between the clocks
_ALGORITHMS = {"P-256": "ES256", "P-384": "ES384", "P-521": "ES512", "Ed25519": "EdDSA"}
# RFC 7638 section 3.2: the required members of a public key in lexicographic order.
_MEMBERS = {"EC": ("crv", "kty", "x", "y"), "RSA": ("e", "kty", "n"), "OKP": ("crv", "kty", "x")}


def _is_encrypted(text: str) -> bool:
    """Return True for text that looks like a JWE in compact or JSON form, and not like a plain JWK."""
    stripped = text.strip()
    return (stripped.count(".") == 4 and not stripped.startswith("{")) or '"ciphertext"' in stripped


def decrypt(text: str, password: Secret[bytes]) -> Secret[bytes]:
    """Decrypt a JWE in compact or flattened JSON form in about 0.2 s of a core; raise ValueError in words that follow "is"."""
    if len(text) > _MAX_BYTES:
        raise ValueError(f"longer than {_MAX_BYTES} bytes")
    protected, encrypted_key, iv, ciphertext, tag = _split(text.strip())
    try:
        header = loads_bounded(decode_base64url(protected), max_bytes=_MAX_BYTES)
        algorithm, encryption, iterations = header["alg"], header["enc"], header["p2c"]
        salt = decode_base64url(header["p2s"])
    except (ValueError, KeyError, TypeError, AttributeError):
        raise ValueError("not a JWE with a password: its header lacks alg, enc, p2c or p2s") from None
    if algorithm != _ALGORITHM or encryption not in _KEY_BYTES or "crit" in header or "zip" in header:
        expected = f"{_ALGORITHM} with {' or '.join(_KEY_BYTES)}"
        raise ValueError(f"encrypted with an unsupported algorithm; expected {expected}")
    if not isinstance(iterations, int) or not MIN_ITERATIONS <= iterations <= MAX_ITERATIONS or len(salt) < 8:
        bounds = f"{MIN_ITERATIONS} to {MAX_ITERATIONS}"
        raise ValueError(f"a JWE whose p2c is not from {bounds}, or whose salt is too short")
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
            document = loads_bounded(text, max_bytes=_MAX_BYTES)
            names = ("protected", "encrypted_key", "iv", "ciphertext", "tag")
            protected, *fields = (document[name] for name in names)
        else:
            protected, *fields = text.split(".")
        encrypted_key, iv, ciphertext, tag = map(decode_base64url, fields)
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        raise ValueError("not a JWE in compact or flattened JSON form") from None
    return str(protected), encrypted_key, iv, ciphertext, tag


@dataclass(frozen=True, slots=True)
class ProvisionerKey:
    """A private JWK that signs tokens."""

    kid: str
    thumbprint: str  # Of the public key (RFC 7638)
    _key: jwt.PyJWK

    def token(self, claims: Mapping[str, object], csr: bytes, now: datetime) -> Secret[str]:
        """Return a JWT (RFC 7519) that step-ca accepts once, within a minute, and only with this CSR (DER)."""
        issued_at = int(now.timestamp())
        payload = {
            **claims,
            "iat": issued_at,
            "nbf": issued_at,
            "exp": issued_at + int(TOKEN_LIFETIME.total_seconds()),
            # Binds the token to the CSR, and so to the key on the node: it is useless for any other key.
            "cnf": {"x5rt#S256": encode_base64url(hashlib.sha256(csr).digest())},
        }
        return Secret(jwt.encode(payload, self._key.key, self._key.algorithm_name, {"kid": self.kid}))


def load_provisioner_key(content: Secret[bytes], password: Secret[bytes] | None) -> ProvisionerKey:
    """Load a private JWK (RFC 7517), plain or encrypted; raise ValueError in words that follow "is" and never show the key."""
    try:
        text = content.reveal().decode("utf-8")
    except UnicodeDecodeError:
        raise ValueError("not a JWK: not UTF-8 text") from None
    if _is_encrypted(text):
        if password is None:
            raise ValueError("encrypted, and no password is configured")
        # Like step, ignore trailing white space: editors and `echo` end a file with a line feed.
        text = decrypt(text, Secret(password.reveal().rstrip())).reveal().decode("utf-8", "replace")
    try:
        document = loads_bounded(text, max_bytes=_MAX_BYTES)
    except (ValueError, RecursionError):
        raise ValueError("not a JWK: not JSON") from None
    return _load(document)


def thumbprint(document: object) -> str | None:
    """Return the SHA-256 thumbprint of a JWK (RFC 7638 section 3) in base64url; None if it is not a public or private JWK."""
    members = _MEMBERS.get(str(document.get("kty"))) if isinstance(document, dict) else None
    if members is None or not isinstance(document, dict):
        return None
    values = {member: document.get(member) for member in members}
    if not all(isinstance(value, str) for value in values.values()):
        return None
    return encode_base64url(hashlib.sha256(json.dumps(values, separators=(",", ":"), sort_keys=True).encode()).digest())


def _load(document: Any) -> ProvisionerKey:
    mark = thumbprint(document)
    if mark is None:
        raise ValueError("not a signing JWK: its type is not EC, RSA or OKP")
    if not document.get("d"):
        raise ValueError("a public JWK; expected a private one")
    kid = document.get("kid")
    if not isinstance(kid, str) or not kid:
        raise ValueError("a JWK without a kid, which step-ca needs to find the provisioner")
    algorithm = "RS256" if document["kty"] == "RSA" else _ALGORITHMS.get(str(document.get("crv")))
    if algorithm is None:
        raise ValueError(f"a JWK with an unsupported curve; expected {', '.join(_ALGORITHMS)}")
    try:
        key = jwt.PyJWK(document, algorithm)
    except (jwt.PyJWTError, ValueError, TypeError, KeyError):
        raise ValueError("not a valid JWK: its numbers are not a key") from None
    return ProvisionerKey(kid, mark, key)
