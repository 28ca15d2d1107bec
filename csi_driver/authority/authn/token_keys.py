"""The keys that the cluster signs service-account tokens with, by key id (RFC 7517)."""

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

from csi_driver.authority.authn.limits import ConcurrencyLimit
from csi_driver.core.cluster.token_review import PublishedKeys
from csi_driver.core.errors import CertmountError, Fault, Reason
from csi_driver.telemetry.authority_metrics import AuthorityMetrics

log = structlog.get_logger(__name__)

ALGORITHMS = ("RS256", "RS384", "RS512", "ES256", "ES384", "ES512")
"""What a Kubernetes API server signs with; none of them works with a shared secret or without a key (RFC 8725 section 3.1)."""
_LEAST_REFRESH_S = 10.0
"""Between two fetches that tokens with unknown key ids cause: made-up ids must not become load on the API server."""
_REFRESH_S = 300.0
"""After which a key that the cluster has withdrawn is no longer believed."""
_MOST_WAITING = 64
"""Calls that wait for the keys to be fetched: with made-up ids no one shall keep those out who have good tokens."""
_MOST_KEYS = 100
_LEAST_RSA_BITS = 2048


@dataclass(frozen=True, slots=True)
class KeySet:
    """Public keys by key id, each bound to the one algorithm it is for."""

    issuer: str
    keys: Mapping[str, jwt.PyJWK]


def parse_keys(published: PublishedKeys) -> KeySet:
    """Takes the asymmetric signing keys with an id; raises CertmountError TokenReviewUnavailable where there is none."""
    try:
        entries = json.loads(published.jwks)["keys"]
        candidates = [_parse_key(entry) for entry in entries[:_MOST_KEYS]]
    except (ValueError, TypeError, KeyError, RecursionError):
        problem = "is not a JSON Web Key Set (RFC 7517)"
        raise CertmountError(Reason.TOKEN_REVIEW_UNAVAILABLE, Fault("token keys", problem)) from None
    keys = {candidate.key_id: candidate for candidate in candidates if candidate is not None and candidate.key_id}
    if not keys:
        problem = "hold no signing key with an id for one of " + ", ".join(ALGORITHMS)
        raise CertmountError(Reason.TOKEN_REVIEW_UNAVAILABLE, Fault("token keys", problem))
    return KeySet(published.issuer, keys)


def _parse_key(entry: Any) -> jwt.PyJWK | None:
    """The key of one entry, or None for one that is not to verify tokens with."""
    if not isinstance(entry, dict) or not isinstance(entry.get("kid"), str):
        return None
    if entry.get("use", "sig") != "sig" or entry.get("alg", ALGORITHMS[0]) not in ALGORITHMS:
        return None
    try:
        key = jwt.PyJWK.from_dict(entry)
    except jwt.PyJWTError:
        return None
    if key.algorithm_name not in ALGORITHMS:  # as inferred where the entry names none
        return None
    return None if isinstance(key.key, rsa.RSAPublicKey) and key.key.key_size < _LEAST_RSA_BITS else key


class TokenKeys:
    """The current key set; fetched anew when a token names an unknown key, at most every ten seconds."""

    def __init__(
        self,
        fetch: Callable[[], Awaitable[PublishedKeys]],
        metrics: AuthorityMetrics,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._fetch = fetch
        self._metrics = metrics
        self._clock = clock
        self._current: KeySet | None = None
        self._asked_at = -_LEAST_REFRESH_S
        self._failure: CertmountError | None = None
        self._lock = asyncio.Lock()
        self._waiting = ConcurrencyLimit(_MOST_WAITING)

    @property
    def known(self) -> bool:
        """True once a key set has been fetched."""
        return self._current is not None

    @property
    def issuer(self) -> str:
        """The issuer that tokens must name; raises CertmountError TokenReviewUnavailable before the first fetch."""
        return self._held().issuer

    async def find(self, key_id: str) -> jwt.PyJWK | None:
        """The key of that id, or None when the cluster publishes none; raises CertmountError TokenReviewUnavailable, or AuthorityOverloaded."""
        key = self._held().keys.get(key_id)
        if key is None:
            with self._waiting:
                async with self._lock:
                    if self._clock() - self._asked_at >= _LEAST_REFRESH_S:
                        await self._refresh()
            key = self._held().keys.get(key_id)
            if key is None and self._failure is not None:
                raise CertmountError(Reason.TOKEN_REVIEW_UNAVAILABLE, *self._failure.faults)
        return key

    async def load(self) -> None:
        """Fetches the key set; raises CertmountError TokenReviewUnavailable where that fails."""
        async with self._lock:
            await self._refresh()
        if self._failure is not None:
            raise self._failure

    async def run(self) -> None:
        """Fetches it every few minutes, for ever; when that fails, the keys held stay in use."""
        while True:
            await asyncio.sleep(_REFRESH_S)
            async with self._lock:
                await self._refresh()

    async def _refresh(self) -> None:
        self._asked_at = self._clock()
        try:
            self._current = parse_keys(await self._fetch())
            self._failure = None
        except CertmountError as error:
            self._failure = error
            self._metrics.proof_failures.labels("keys").inc()
            log.warning("token keys not refreshed", reason=error.reason.word, error=str(error))

    def _held(self) -> KeySet:
        if self._current is None:
            raise CertmountError(
                Reason.TOKEN_REVIEW_UNAVAILABLE, "the keys that the cluster signs tokens with are not known yet"
            )
        return self._current
