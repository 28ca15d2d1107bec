"""The key of a JWK provisioner, and the one-time tokens that it signs: one for one certificate signing request."""

from __future__ import annotations

import base64
import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import Any

import jwt

from csi_driver.authority.issuers.step_ca import key_encryption as jwe
from csi_driver.core.secret import Secret

TOKEN_LIFE = timedelta(minutes=1)
"""From minting to step-ca's look at it; step-ca allows a minute of difference between the clocks besides."""
_ALGORITHMS = {"P-256": "ES256", "P-384": "ES384", "P-521": "ES512", "Ed25519": "EdDSA"}
# RFC 7638 section 3.2: the members that make up a key, in their lexical order.
_MEMBERS = {"EC": ("crv", "kty", "x", "y"), "RSA": ("e", "kty", "n"), "OKP": ("crv", "kty", "x")}


@dataclass(frozen=True, slots=True)
class Claims:
    """What a token allows: these names in one certificate, for this very request."""

    issuer: str
    """The provisioner's name."""
    audience: str
    subject: str
    sans: Sequence[str]
    purposes: Sequence[str]
    """Extended key usages as step-ca's templates name them; a template may read them as ``.Token.extKeyUsage``."""
    csr: bytes
    """DER."""
    nonce: str
    """Another one for every token."""


@dataclass(frozen=True, slots=True)
class ProvisionerKey:
    """A private JWK that may sign."""

    kid: str
    thumbprint: str
    """Of its public half: equal for equal keys (RFC 7638)."""
    _key: jwt.PyJWK

    def token(self, claims: Claims, now: datetime) -> Secret[str]:
        """A JWT (RFC 7519) that step-ca takes once, within a minute, and with this request only."""
        issued = int(now.timestamp())
        payload = {
            "iss": claims.issuer,
            "aud": claims.audience,
            "sub": claims.subject,
            "sans": list(claims.sans),
            "extKeyUsage": list(claims.purposes),
            "jti": claims.nonce,
            "iat": issued,
            "nbf": issued,
            "exp": issued + int(TOKEN_LIFE.total_seconds()),
            # Ties the token to the request, and so to the key on the node: whoever reads it can use it for nothing else.
            "cnf": {"x5rt#S256": _base64url(hashlib.sha256(claims.csr).digest())},
        }
        return Secret(jwt.encode(payload, self._key.key, self._key.algorithm_name, {"kid": self.kid}))


def load_provisioner_key(content: Secret[bytes], password: Secret[bytes] | None) -> ProvisionerKey:
    """Reads a private JWK (RFC 7517), plain or encrypted as ``step crypto jwk create`` writes it; not for the event loop.

    Raises:
        ValueError: in words that follow "is", which never show the key.
    """
    try:
        text = content.reveal().decode("utf-8")
    except UnicodeDecodeError:
        raise ValueError("not a JWK: it is no text") from None
    if jwe.is_encrypted(text):
        if password is None:
            raise ValueError("encrypted, and there is no password for it")
        # As step does: an editor or `echo` ends a file with a line feed, which is no part of the password.
        text = jwe.decrypt(text, Secret(password.reveal().rstrip())).reveal().decode("utf-8", "replace")
    try:
        document = json.loads(text)
    except (ValueError, RecursionError):
        raise ValueError("not a JWK: it is no JSON") from None
    return _loaded(document)


def thumbprint(document: object) -> str | None:
    """The SHA-256 thumbprint of a JWK's public half (RFC 7638 section 3), in base64url; None for what is none."""
    members = _MEMBERS.get(str(document.get("kty"))) if isinstance(document, dict) else None
    if (
        members is None
        or not isinstance(document, dict)
        or not all(isinstance(document.get(one), str) for one in members)
    ):
        return None
    text = json.dumps({member: document[member] for member in members}, separators=(",", ":"), sort_keys=True)
    return _base64url(hashlib.sha256(text.encode()).digest())


def _loaded(document: Any) -> ProvisionerKey:
    mark = thumbprint(document)
    if mark is None:
        raise ValueError("not a JWK of a kind that signs: EC, RSA or OKP")
    if not document.get("d"):
        raise ValueError("a public JWK; the private one is needed")
    kid = document.get("kid")
    if not isinstance(kid, str) or not kid:
        raise ValueError("a JWK without a kid, by which step-ca finds the provisioner")
    algorithm = "RS256" if document["kty"] == "RSA" else _ALGORITHMS.get(str(document.get("crv")))
    if algorithm is None:
        raise ValueError(f"a JWK of another curve than {', '.join(_ALGORITHMS)}")
    try:
        key = jwt.PyJWK(document, algorithm)
    except (jwt.PyJWTError, ValueError, TypeError, KeyError):
        raise ValueError("not a JWK whose numbers make a key") from None
    return ProvisionerKey(kid, mark, key)


def _base64url(raw: bytes) -> str:
    return base64.urlsafe_b64encode(raw).rstrip(b"=").decode("ascii")
