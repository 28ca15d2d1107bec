"""Service-account tokens, verified without asking anyone: signature, issuer, audience, times (RFC 7519, RFC 8725)."""

from __future__ import annotations

import base64
import binascii
import json
import time
from collections.abc import Callable
from functools import lru_cache
from typing import Any

import jwt

from csi_driver.authority.authn.token_keys import ALGORITHMS, TokenKeys
from csi_driver.core.errors import CertmountError, Fault, Reason
from csi_driver.core.identity import MAX_TOKEN_BYTES, PodIdentity, identity_from_claims
from csi_driver.core.secret import Secret

_CLOCK_SKEW_S = 30.0
"""How far the API server's clock may be ahead of ours; an expired token gets no such grace."""
_MAX_HEADER = 1024
_OTHERS = "ask the cluster's administrator which API server signed it"


class TokenVerifier:
    """Believes a token only by a key that the cluster publishes; whatever key the token itself carries is ignored."""

    def __init__(self, keys: TokenKeys, clock: Callable[[], float] = time.time) -> None:
        self._keys = keys
        self._clock = clock

    async def verify(self, token: Secret[str], audience: str, which: str) -> PodIdentity:
        """The identity that the token proves; ``which`` names the token in errors ("pod token").

        Raises:
            CertmountError: TokenExpired, TokenRejected, ClusterNotSupported, or TokenReviewUnavailable without keys.
        """
        text = token.reveal()
        if not text:
            raise CertmountError(Reason.TOKEN_REJECTED, Fault(which, "is missing"))
        if len(text) > MAX_TOKEN_BYTES or not text.isascii():
            raise _refused(which, f"is not a JSON Web Token of at most {MAX_TOKEN_BYTES} bytes")
        key = await self._key_for(text, which)
        try:
            claims = jwt.decode(
                text,
                key,
                algorithms=[key.algorithm_name],
                audience=audience,
                issuer=self._keys.issuer,
                # Not-before and issued-at are judged below, where the clock's skew is allowed for.
                options={"require": ["exp", "iss", "aud", "sub"], "verify_nbf": False, "verify_iat": False},
            )
        except jwt.PyJWTError as error:
            raise _explained(error, which, audience, self._keys.issuer) from None
        self._check_times(claims, which)
        if claims["aud"] not in (audience, [audience]):
            raise _refused(
                which, f"is for other audiences beside {audience}", "whoever else holds it could show it here"
            )
        return identity_from_claims(claims, token=which)

    async def _key_for(self, text: str, which: str) -> jwt.PyJWK:
        key_id = _key_id(text.partition(".")[0][: _MAX_HEADER + 1])
        if key_id is None:
            raise _refused(which, "is not a JSON Web Token whose header names its key")
        key = await self._keys.find(key_id)
        if key is None:
            raise _refused(which, "is signed by a key that the cluster does not publish", _OTHERS)
        return key

    def _check_times(self, claims: dict[str, Any], which: str) -> None:
        latest = self._clock() + _CLOCK_SKEW_S
        for claim in ("nbf", "iat"):
            value = claims.get(claim, 0)
            if not isinstance(value, int | float) or value > latest:
                raise _refused(which, "is not valid yet", "compare the clocks of the API server and the authority")


@lru_cache(maxsize=64)  # a cluster's tokens share their header, one a key
def _key_id(segment: str) -> str | None:
    """The ``kid`` of a token's header; it only chooses among the cluster's keys, so nothing is believed here."""
    if not segment or len(segment) > _MAX_HEADER:
        return None
    try:
        header = json.loads(base64.urlsafe_b64decode(segment + "=" * (-len(segment) % 4)))
    except (ValueError, binascii.Error, RecursionError):
        return None
    key_id = header.get("kid") if isinstance(header, dict) and header.get("alg") in ALGORITHMS else None
    return key_id if isinstance(key_id, str) else None


def _explained(error: jwt.PyJWTError, which: str, audience: str, issuer: str) -> CertmountError:
    """The library's verdict in our words; its own text may quote the token's claims."""
    if isinstance(error, jwt.ExpiredSignatureError):
        fault = Fault(
            which, "has expired", "the kubelet renews it before that; see the node's connection to the API server"
        )
        return CertmountError(Reason.TOKEN_EXPIRED, fault)
    if isinstance(error, jwt.InvalidAudienceError):
        return _refused(which, f"is for another audience than {audience}")
    if isinstance(error, jwt.InvalidIssuerError):
        return _refused(which, f"is from another issuer than {issuer}", _OTHERS)
    if isinstance(error, jwt.MissingRequiredClaimError):
        return _refused(which, "lacks one of the claims exp, iss, aud, sub")
    if isinstance(error, jwt.InvalidAlgorithmError):
        return _refused(which, "names another algorithm than the cluster's key is for")
    if isinstance(error, jwt.InvalidSignatureError):
        return _refused(which, "has a signature that does not fit", _OTHERS)
    return _refused(which, "is not a JSON Web Token")


def _refused(which: str, problem: str, hint: str = "") -> CertmountError:
    return CertmountError(Reason.TOKEN_REJECTED, Fault(which, problem, hint))
