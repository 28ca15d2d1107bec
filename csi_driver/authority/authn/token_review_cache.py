"""Verify tokens offline and by a TokenReview, whose result counts for five seconds."""

from __future__ import annotations

import asyncio
import functools
import hashlib
import time
from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

from csi_driver import NODE_AUDIENCE, POD_AUDIENCE, SECRETS_AUDIENCE
from csi_driver.authority.authn.token_verifier import TokenVerifier
from csi_driver.authority.retry import retry_while_unavailable
from csi_driver.core.cluster.objects import ReviewedToken
from csi_driver.core.errors import CertmountError, Fault, Reason
from csi_driver.core.identity import PodIdentity
from csi_driver.core.secret import Secret
from csi_driver.core.shares import FairShares
from csi_driver.telemetry.authority_metrics import AuthorityMetrics

MAX_REVIEWS = 256
"""TokenReviews in progress, a few for each connection to the API server."""
MAX_CACHED_REVIEWS = 20_000
_CACHED_S = 5.0
"""The token of a deleted pod works at most this much longer. All volumes of a starting pod need one review."""
_FAILURE_EXPIRES_S = 30.0  # without calls the cache cannot observe that the API server has recovered


class TokenReviewer(Protocol):
    """Verifies that a token is live."""

    async def review(self, token: Secret[str], audience: str) -> ReviewedToken | None:
        """Return the token's identity, None without a cluster; raises CertmountError TokenRejected or TokenReviewUnavailable."""


class OfflineReviewer:
    """Accepts every token without a review."""

    async def review(self, token: Secret[str], audience: str) -> None: ...


def _node(driver: PodIdentity) -> Sequence[str]:
    return (f"node {driver.node_name}",)  # all drivers have the same service account


@dataclass(frozen=True, slots=True)
class TokenKind:
    """What errors call the token, its audience, and whose share its reviews use."""

    name: str
    audience: str
    owners: Callable[[PodIdentity], Sequence[str]]


POD_TOKEN = TokenKind("pod token", POD_AUDIENCE, lambda pod: pod.owners)
NODE_TOKEN = TokenKind("node token", NODE_AUDIENCE, _node)
CONTROLLER_TOKEN = TokenKind("controller token", SECRETS_AUDIENCE, lambda controller: controller.tenants)


@dataclass(frozen=True, slots=True)
class _Outcome:
    result: PodIdentity | CertmountError
    owners: Sequence[str] = ()
    cached_until: float = 0.0  # seconds of the monotonic clock; 0: the result is not cached

    def unwrap(self) -> PodIdentity:
        if isinstance(self.result, CertmountError):
            # Each caller gets a new exception, because a shared one would collect the tracebacks of all callers.
            raise CertmountError(self.result.reason, *self.result.faults)
        return self.result


@dataclass(eq=False)
class TokenReviewCache:
    """Verifies tokens, with one review per token at a time. A cached result never outlives its token."""

    verifier: TokenVerifier
    reviewer: TokenReviewer
    metrics: AuthorityMetrics
    clock: Callable[[], float] = time.monotonic

    def __post_init__(self) -> None:
        self._cached: OrderedDict[bytes, _Outcome] = OrderedDict()  # in the order of their expiry
        self._cache_shares = FairShares("cached TokenReviews", MAX_CACHED_REVIEWS)
        self._review_shares = FairShares("TokenReviews in progress", MAX_REVIEWS, full=Reason.AUTHORITY_OVERLOADED)
        self._in_progress: dict[bytes, asyncio.Future[_Outcome]] = {}
        self._first_failure: float | None = None
        self._last_failure = 0.0

    @property
    def failing_s(self) -> float:
        """The seconds for which all reviews have failed; 0 without a recent failure."""
        now = self.clock()
        if self._first_failure is None or now - self._last_failure >= _FAILURE_EXPIRES_S:
            return 0.0
        return now - self._first_failure

    async def review(self, token: Secret[str], kind: TokenKind, check: Callable[[PodIdentity], None]) -> PodIdentity:
        """Return the identity that the token proves; raises CertmountError as ``verifier``, ``check`` and ``reviewer`` do.

        ``check`` gets the identity before it is reviewed, so that a review costs the API server nothing if it raises.
        """
        key = hashlib.sha256(f"{kind.audience}\n{token.reveal()}".encode(errors="surrogatepass")).digest()
        verified: PodIdentity | None = None
        while True:
            if cached := self._find(key):
                identity = cached.unwrap()
                check(identity)
                return identity
            if verified is None:
                # Failures of these two steps are not cached, so that made-up tokens cannot evict other results.
                verified = await self.verifier.verify(token, kind.audience, kind.name)
                check(verified)
                continue
            in_progress = self._in_progress.get(key)
            if in_progress is None:
                return (await self._review_once(key, token, kind, verified)).unwrap()
            await asyncio.wait([in_progress])
            if not in_progress.cancelled():
                return in_progress.result().unwrap()
            # The caller that made the review was cancelled, so one of the waiting callers makes it again.

    async def _review_once(self, key: bytes, token: Secret[str], kind: TokenKind, identity: PodIdentity) -> _Outcome:
        owners = kind.owners(identity)
        with self._review_shares.hold(owners):
            future = self._in_progress[key] = asyncio.get_running_loop().create_future()
            try:
                cached_until = self.clock() + _CACHED_S
                try:
                    await self._verify_live(token, kind, identity)
                    outcome = _Outcome(identity, owners, cached_until)
                except CertmountError as error:
                    # A rejected token never becomes valid again. A retryable failure is not cached.
                    outcome = _Outcome(error, owners, 0.0 if error.retryable else cached_until)
                self._cache(key, outcome)
                future.set_result(outcome)
            finally:
                del self._in_progress[key]
                future.cancel()
        return outcome

    async def _verify_live(self, token: Secret[str], kind: TokenKind, identity: PodIdentity) -> None:
        try:
            reviewed = await retry_while_unavailable(functools.partial(self._call_reviewer, token, kind.audience))
        except CertmountError as error:
            raise CertmountError(error.reason, *(Fault(kind.name, str(fault)) for fault in error.faults)) from None
        if reviewed is not None:
            _compare(identity, reviewed, kind.name)

    async def _call_reviewer(self, token: Secret[str], audience: str) -> ReviewedToken | None:
        started = time.perf_counter()
        try:
            reviewed = await self.reviewer.review(token, audience)
        except CertmountError as error:
            if error.retryable:
                self.metrics.token_verification_failures.labels("review").inc()
                self._last_failure = self.clock()
                if self._first_failure is None:
                    self._first_failure = self._last_failure
            else:
                self._first_failure = None
            raise
        finally:
            self.metrics.review_seconds.observe(time.perf_counter() - started)
        self._first_failure = None
        return reviewed

    def _find(self, key: bytes) -> _Outcome | None:
        cached = self._cached.get(key)
        if cached is None or self.clock() >= cached.cached_until:
            return None
        if isinstance(cached.result, PodIdentity) and self.verifier.clock() >= cached.result.expires_at:
            return None
        return cached

    def _cache(self, key: bytes, outcome: _Outcome) -> None:
        """Keep a result for five seconds, if its owners' share allows; otherwise only they need another review."""
        now = self.clock()
        self._remove(key)
        while self._cached and (oldest := next(iter(self._cached.items())))[1].cached_until <= now:
            self._remove(oldest[0])
        if outcome.cached_until and self._cache_shares.try_take(outcome.owners):
            self._cached[key] = outcome

    def _remove(self, key: bytes) -> None:
        if (outcome := self._cached.pop(key, None)) is not None:
            self._cache_shares.give_back(outcome.owners)


def _compare(identity: PodIdentity, reviewed: ReviewedToken, token_name: str) -> None:
    """Raise CertmountError TokenRejected unless the claims and the TokenReview agree in every field."""
    fields = {
        "service account": identity.service_account.username == reviewed.username,
        "service account UID": identity.service_account_uid == reviewed.uid,
        "pod": identity.pod_name == reviewed.pod_name,
        "pod UID": identity.pod_uid == reviewed.pod_uid,
        "node": identity.node_name == reviewed.node_name,
        "node UID": identity.node_uid == reviewed.node_uid,
    }
    problem = "its claims and the API server's TokenReview name different values for"
    if faults := [Fault(token_name, f"{problem} {field}") for field, equal in fields.items() if not equal]:
        raise CertmountError(Reason.TOKEN_REJECTED, *faults)
