"""The cluster's public keys for service-account tokens, by key ID (RFC 7517)."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass
from typing import Any

import jwt
import structlog
from cryptography.hazmat.primitives.asymmetric import rsa

from csi_driver.core.cluster.objects import PublishedKeys
from csi_driver.core.errors import CertmountError, Fault, Reason
from csi_driver.telemetry.authority_metrics import AuthorityMetrics

log = structlog.get_logger(__name__)

ALGORITHMS = ("RS256", "RS384", "RS512", "ES256", "ES384", "ES512")
"""The algorithms of Kubernetes API servers. None of them uses a shared secret or no key (RFC 8725 section 3.1)."""
_MIN_REFRESH_INTERVAL_S = 10.0  # limits the requests to the API server that tokens with unknown key IDs cause
_REFRESH_INTERVAL_S = 300.0  # until a key that the cluster withdraws is rejected
_MAX_KEYS = 100
_MIN_RSA_BITS = 2048


@dataclass(frozen=True, slots=True)
class TokenKeySet:
    """Public keys by key ID. Each key verifies one algorithm only."""

    issuer: str
    keys: Mapping[str, jwt.PyJWK]


def parse_keys(published: PublishedKeys) -> TokenKeySet:
    """Return the asymmetric signing keys that have an ID; raises CertmountError TokenReviewUnavailable if there is none."""
    try:
        entries = json.loads(published.jwks)["keys"]
        candidates = [_parse_key(entry) for entry in entries[:_MAX_KEYS]]
    except (ValueError, TypeError, KeyError, RecursionError):
        raise _invalid_keys("is not a JSON Web Key Set (RFC 7517)") from None
    keys = {candidate.key_id: candidate for candidate in candidates if candidate is not None and candidate.key_id}
    if not keys:
        raise _invalid_keys(f"contains no signing key that has an ID and uses one of {', '.join(ALGORITHMS)}")
    return TokenKeySet(published.issuer, keys)


def _invalid_keys(problem: str) -> CertmountError:
    return CertmountError(Reason.TOKEN_REVIEW_UNAVAILABLE, Fault("token keys", problem))


def _parse_key(entry: Any) -> jwt.PyJWK | None:
    """Return the key of one entry, or None if it must not verify tokens."""
    if not isinstance(entry, dict) or not isinstance(entry.get("kid"), str):
        return None
    if entry.get("use", "sig") != "sig" or entry.get("alg", ALGORITHMS[0]) not in ALGORITHMS:
        return None
    try:
        key = jwt.PyJWK.from_dict(entry)
    except jwt.PyJWTError:
        return None
    too_short = isinstance(key.key, rsa.RSAPublicKey) and key.key.key_size < _MIN_RSA_BITS
    return None if too_short or key.algorithm_name not in ALGORITHMS else key  # PyJWT infers a missing algorithm


@dataclass(eq=False)
class TokenKeys:
    """The current key set. A token with an unknown key ID causes a refresh, at most every ten seconds."""

    fetch: Callable[[], Awaitable[PublishedKeys]]
    metrics: AuthorityMetrics
    clock: Callable[[], float] = time.monotonic

    def __post_init__(self) -> None:
        self._current: TokenKeySet | None = None
        self._refreshed_at = -_MIN_REFRESH_INTERVAL_S
        self._failure: CertmountError | None = None
        self._lock = asyncio.Lock()

    @property
    def loaded(self) -> bool:
        return self._current is not None

    @property
    def issuer(self) -> str:
        """The required issuer of tokens; raises CertmountError TokenReviewUnavailable before the first load."""
        return self._loaded().issuer

    async def find(self, key_id: str) -> jwt.PyJWK | None:
        """Return None if the cluster publishes no such key; raises CertmountError if a refresh failed."""
        if key := self._loaded().keys.get(key_id):
            return key
        async with self._lock:
            if self.clock() - self._refreshed_at >= _MIN_REFRESH_INTERVAL_S:
                await self._refresh()
        key = self._loaded().keys.get(key_id)
        if key is None and self._failure is not None:
            raise CertmountError(Reason.TOKEN_REVIEW_UNAVAILABLE, *self._failure.faults)
        return key

    async def load(self) -> None:
        async with self._lock:
            await self._refresh()
        if self._failure is not None:
            raise self._failure

    async def run(self) -> None:
        """Refresh the key set periodically, until cancelled. The present keys stay in use after a failure."""
        while True:
            await asyncio.sleep(_REFRESH_INTERVAL_S)
            async with self._lock:
                await self._refresh()

    async def _refresh(self) -> None:
        self._refreshed_at = self.clock()
        try:
            self._current = parse_keys(await self.fetch())
            self._failure = None
        except CertmountError as error:
            self._failure = error
            self.metrics.token_verification_failures.labels("keys").inc()
            log.warning("token keys not refreshed", reason=error.reason.word, error=str(error))

    def _loaded(self) -> TokenKeySet:
        if self._current is None:
            raise CertmountError(Reason.TOKEN_REVIEW_UNAVAILABLE, "the cluster's token keys are not loaded yet")
        return self._current
