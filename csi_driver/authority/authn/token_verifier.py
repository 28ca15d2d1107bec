"""Verify service-account tokens offline: signature, issuer, audience and times (RFC 7519, RFC 8725)."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import jwt

from csi_driver.authority.authn.common_tokens import common_claims
from csi_driver.authority.authn.token_keys import ALGORITHMS, TokenKeys
from csi_driver.core.clocks import describe_skew
from csi_driver.core.errors import CertmountError, Fault, Reason
from csi_driver.core.identity import MAX_TOKEN_BYTES, PodIdentity, decode_base64url, identity_from_claims
from csi_driver.core.secret import Secret

_CLOCK_SKEW_S = 30.0  # allowed for not-before and issued-at only; an expired token is rejected immediately
_MAX_HEADER = 1024
_WRONG_CLUSTER = "check that the token is from this cluster's API server"


@dataclass(frozen=True, slots=True)
class TokenVerifier:
    """Verifies tokens with the keys that the cluster publishes; keys in a token's header are ignored."""

    keys: TokenKeys
    clock: Callable[[], float] = time.time

    async def verify(self, token: Secret[str], audience: str, token_name: str) -> PodIdentity:
        """Return the identity in the claims; raises CertmountError, whose faults name the token with ``token_name``."""
        if not (text := token.reveal()):
            raise token_rejected(token_name, "is missing")
        if len(text) > MAX_TOKEN_BYTES or not text.isascii():
            raise token_rejected(token_name, f"is not a JSON Web Token of at most {MAX_TOKEN_BYTES} bytes")
        key, issuer = await self._find_key(text, token_name), self.keys.issuer
        claims = common_claims(text, key, audience, issuer)
        if claims is None:
            try:
                claims = decode(text, key, audience, issuer)
            except jwt.PyJWTError as error:
                raise _translate(error, token_name, audience, issuer) from None
        self._check_times(claims, token_name)
        if claims["aud"] not in (audience, [audience]):
            hint = "another recipient of this token could use it; request a token for one audience"
            raise token_rejected(token_name, f"has audiences in addition to {audience}", hint)
        return identity_from_claims(claims, token=token_name)

    async def _find_key(self, text: str, token_name: str) -> jwt.PyJWK:
        key_id = _key_id(text.partition(".")[0][: _MAX_HEADER + 1])
        if key_id is None:
            raise token_rejected(token_name, "is not a JSON Web Token with a key ID in its header")
        key = await self.keys.find(key_id)
        if key is None:
            raise token_rejected(token_name, "is signed by a key that the cluster does not publish", _WRONG_CLUSTER)
        return key

    def _check_times(self, claims: dict[str, Any], token_name: str) -> None:
        now = self.clock()
        for claim in ("nbf", "iat"):
            value = claims.get(claim, 0)
            if not isinstance(value, int | float):
                raise token_rejected(token_name, f"has an invalid claim {claim}")
            if value > now + _CLOCK_SKEW_S:
                clocks = describe_skew("the authority", "the API server", value - now, at_least=True)
                raise token_rejected(token_name, "is not valid yet", clocks)


def decode(text: str, key: jwt.PyJWK, audience: str, issuer: str) -> dict[str, Any]:
    """Return the claims of a valid token; raises PyJWTError. :meth:`TokenVerifier.verify` checks not-before and issued-at."""
    options: jwt.types.Options = {"require": ["exp", "iss", "aud", "sub"], "verify_nbf": False, "verify_iat": False}
    return jwt.decode(text, key, algorithms=[key.algorithm_name], audience=audience, issuer=issuer, options=options)


@lru_cache(maxsize=64)  # all tokens of a signing key have the same header
def _key_id(segment: str) -> str | None:
    """Return the ``kid`` of a token's header. It only selects one of the cluster's keys, so it needs no verification."""
    if not segment or len(segment) > _MAX_HEADER:
        return None
    try:
        header = json.loads(decode_base64url(segment))
    except (ValueError, RecursionError):
        return None
    key_id = header.get("kid") if isinstance(header, dict) and header.get("alg") in ALGORITHMS else None
    return key_id if isinstance(key_id, str) else None


def _translate(error: jwt.PyJWTError, token_name: str, audience: str, issuer: str) -> CertmountError:
    """Return our error for PyJWT's; its text is not used because it can quote the token's claims."""
    match error:
        case jwt.ExpiredSignatureError():
            hint = (
                "the kubelet renews tokens before they expire; check the node's connection to the API server, and "
                "compare the clocks of the authority and the API server"
            )
            return CertmountError(Reason.TOKEN_EXPIRED, Fault(token_name, "has expired", hint))
        case jwt.InvalidAudienceError():
            return token_rejected(token_name, f"has another audience; expected {audience}")
        case jwt.InvalidIssuerError():
            return token_rejected(token_name, f"has another issuer; expected {issuer}", _WRONG_CLUSTER)
        case jwt.MissingRequiredClaimError():
            return token_rejected(token_name, "lacks one of the claims exp, iss, aud, sub")
        case jwt.InvalidAlgorithmError():
            return token_rejected(token_name, "does not use the algorithm of the cluster's key")
        case jwt.InvalidSignatureError():
            return token_rejected(token_name, "has an invalid signature", _WRONG_CLUSTER)
    return token_rejected(token_name, "is not a JSON Web Token")


def token_rejected(token_name: str, problem: str, hint: str = "") -> CertmountError:
    return CertmountError(Reason.TOKEN_REJECTED, Fault(token_name, problem, hint))
