"""The key of a JWK provisioner, and the one-time tokens that it signs."""

from __future__ import annotations

import base64
import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import Any

import jwt

from csi_driver.authority.issuers.step_ca import key_encryption
from csi_driver.core.secret import Secret

TOKEN_LIFETIME = timedelta(minutes=1)  # step-ca tolerates one more minute of difference between the clocks
_ALGORITHMS = {"P-256": "ES256", "P-384": "ES384", "P-521": "ES512", "Ed25519": "EdDSA"}
# RFC 7638 section 3.2: the required members of a public key in lexicographic order.
_MEMBERS = {"EC": ("crv", "kty", "x", "y"), "RSA": ("e", "kty", "n"), "OKP": ("crv", "kty", "x")}


@dataclass(frozen=True, slots=True)
class TokenClaims:
    """What a token allows: one certificate with these names for this CSR."""

    issuer: str  # The provisioner's name
    audience: str
    subject: str
    sans: Sequence[str]
    usages: Sequence[str]
    """Extended key usages by their names in step-ca's templates, which can read them as ``.Token.extKeyUsage``."""
    csr: bytes  # DER
    nonce: str  # Unique for each token


@dataclass(frozen=True, slots=True)
class ProvisionerKey:
    """A private JWK that signs tokens."""

    kid: str
    thumbprint: str  # Of the public key (RFC 7638)
    _key: jwt.PyJWK

    def token(self, claims: TokenClaims, now: datetime) -> Secret[str]:
        """Return a JWT (RFC 7519) that step-ca accepts once, within a minute, and only with this CSR."""
        issued_at = int(now.timestamp())
        payload = {
            "iss": claims.issuer,
            "aud": claims.audience,
            "sub": claims.subject,
            "sans": list(claims.sans),
            "extKeyUsage": list(claims.usages),
            "jti": claims.nonce,
            "iat": issued_at,
            "nbf": issued_at,
            "exp": issued_at + int(TOKEN_LIFETIME.total_seconds()),
            # Binds the token to the CSR, and so to the key on the node: it is useless for any other key.
            "cnf": {"x5rt#S256": _base64url(hashlib.sha256(claims.csr).digest())},
        }
        return Secret(jwt.encode(payload, self._key.key, self._key.algorithm_name, {"kid": self.kid}))


def load_provisioner_key(content: Secret[bytes], password: Secret[bytes] | None) -> ProvisionerKey:
    """Load a private JWK (RFC 7517), plain or as ``step crypto jwk create`` encrypts it. Call it in a thread.

    Raises:
        ValueError: in words that follow "is" and never show the key.
    """
    try:
        text = content.reveal().decode("utf-8")
    except UnicodeDecodeError:
        raise ValueError("not a JWK: not UTF-8 text") from None
    if key_encryption.is_encrypted(text):
        if password is None:
            raise ValueError("encrypted, and no password is configured")
        # Like step, ignore trailing white space: editors and `echo` end a file with a line feed.
        text = key_encryption.decrypt(text, Secret(password.reveal().rstrip())).reveal().decode("utf-8", "replace")
    try:
        document = json.loads(text)
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
    return _base64url(hashlib.sha256(json.dumps(values, separators=(",", ":"), sort_keys=True).encode()).digest())


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


def _base64url(raw: bytes) -> str:
    return base64.urlsafe_b64encode(raw).rstrip(b"=").decode("ascii")
