"""Authenticate the node driver that calls and the pod whose token it sends: offline, by a TokenReview, and with a cache."""

from __future__ import annotations

import asyncio
import functools
import hashlib
import time
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

from csi_driver import NODE_AUDIENCE, POD_AUDIENCE
from csi_driver.authority.authn.token_verifier import TokenVerifier, token_rejected
from csi_driver.authority.retry import retry_while_unavailable
from csi_driver.core.cluster.objects import ReviewedToken
from csi_driver.core.errors import CertmountError, Fault, Reason
from csi_driver.core.identity import PodIdentity, ServiceAccount
from csi_driver.core.secret import Secret
from csi_driver.telemetry.authority_metrics import AuthorityMetrics

_POD_TOKEN, _NODE_TOKEN = "pod token", "node token"
_CACHED_S = 5.0
"""The token of a deleted pod works at most this much longer. All volumes of a starting pod need one review."""
_MAX_CACHED = 20_000
_FAILURE_EXPIRES_S = 30.0  # without calls the cache cannot observe that the API server has recovered


class TokenReviewer(Protocol):
    """Verifies that a token is live."""

    async def review(self, token: Secret[str], audience: str) -> ReviewedToken | None:
        """Return the token's identity, None without a cluster; raises CertmountError TokenRejected or TokenReviewUnavailable."""


class OfflineReviewer:
    """Accepts every token without a review."""

    async def review(self, token: Secret[str], audience: str) -> None: ...


@dataclass(frozen=True, slots=True)
class _Outcome:
    result: PodIdentity | CertmountError
    cached_until: float  # Unix seconds; 0: the result is not cached

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
    clock: Callable[[], float] = time.time

    def __post_init__(self) -> None:
        self._cached: OrderedDict[bytes, _Outcome] = OrderedDict()
        self._in_progress: dict[bytes, asyncio.Future[_Outcome]] = {}
        self._first_failure: float | None = None
        self._last_failure = 0.0

    @property
    def failing_since(self) -> float | None:
        """The time (Unix seconds) since when all reviews have failed; None without a recent failure."""
        return self._first_failure if self.clock() - self._last_failure < _FAILURE_EXPIRES_S else None

    async def review(self, token: Secret[str], audience: str, token_name: str) -> PodIdentity:
        """Return the identity that the token proves; raises CertmountError as ``verifier`` and ``reviewer`` do."""
        key = hashlib.sha256(f"{audience}\n{token.reveal()}".encode(errors="surrogatepass")).digest()
        verified: PodIdentity | None = None
        while True:
            cached = self._cached.get(key)
            if cached is not None and self.clock() < cached.cached_until:
                return cached.unwrap()
            if verified is None:
                # Failures of this step are not cached, so that made-up tokens cannot evict other results.
                verified = await self.verifier.verify(token, audience, token_name)
                continue
            in_progress = self._in_progress.get(key)
            if in_progress is None:
                return (await self._review_once(key, token, audience, token_name, verified)).unwrap()
            await asyncio.wait([in_progress])
            if not in_progress.cancelled():
                return in_progress.result().unwrap()
            # The caller that made the review was cancelled, so one of the waiting callers makes it again.

    async def _review_once(
        self, key: bytes, token: Secret[str], audience: str, token_name: str, identity: PodIdentity
    ) -> _Outcome:
        future = self._in_progress[key] = asyncio.get_running_loop().create_future()
        try:
            cached_until = self.clock() + _CACHED_S
            try:
                await self._verify_live(token, audience, token_name, identity)
                outcome = _Outcome(identity, min(cached_until, identity.expires_at))
            except CertmountError as error:
                # A rejected token never becomes valid again. A retryable failure is not cached.
                outcome = _Outcome(error, 0.0 if error.retryable else cached_until)
            if outcome.cached_until:
                self._cache(key, outcome)
            future.set_result(outcome)
        finally:
            del self._in_progress[key]
            future.cancel()
        return outcome

    async def _verify_live(self, token: Secret[str], audience: str, token_name: str, identity: PodIdentity) -> None:
        try:
            reviewed = await retry_while_unavailable(functools.partial(self._call_reviewer, token, audience))
        except CertmountError as error:
            raise CertmountError(error.reason, *(Fault(token_name, str(fault)) for fault in error.faults)) from None
        if reviewed is not None:
            _compare(identity, reviewed, token_name)

    async def _call_reviewer(self, token: Secret[str], audience: str) -> ReviewedToken | None:
        started = time.perf_counter()
        try:
            reviewed = await self.reviewer.review(token, audience)
        except CertmountError as error:
            if error.retryable:
                self.metrics.token_verification_failures.labels("review").inc()
                self._last_failure = self.clock()
                self._first_failure = self._first_failure or self._last_failure
            else:
                self._first_failure = None
            raise
        finally:
            self.metrics.review_seconds.observe(time.perf_counter() - started)
        self._first_failure = None
        return reviewed

    def _cache(self, key: bytes, outcome: _Outcome) -> None:
        now = self.clock()
        self._cached[key] = outcome
        self._cached.move_to_end(key)
        while self._cached and (
            len(self._cached) > _MAX_CACHED or next(iter(self._cached.values())).cached_until <= now
        ):
            self._cached.popitem(last=False)


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


@dataclass(frozen=True, slots=True)
class Authenticator:
    """Accepts a node token only from the node driver's service account, and a pod token only from the pod's own node."""

    reviews: TokenReviewCache
    node_account: ServiceAccount

    async def authenticate_node(self, token: Secret[str]) -> PodIdentity:
        """Return the identity of the calling driver's pod; raises CertmountError as :meth:`TokenReviewCache.review`."""
        driver = await self.reviews.review(token, NODE_AUDIENCE, _NODE_TOKEN)
        if driver.service_account != self.node_account:
            problem = f"belongs to service account {driver.service_account}; expected {self.node_account}"
            hint = "set the authority's --node-service-account to the service account of the node driver"
            raise token_rejected(_NODE_TOKEN, problem, hint)
        return driver

    async def authenticate_pod(self, token: Secret[str], node: PodIdentity) -> PodIdentity:
        """Return the identity of a pod on the node of the calling driver; raises CertmountError likewise."""
        pod = await self.reviews.review(token, POD_AUDIENCE, _POD_TOKEN)
        if (pod.node_name, pod.node_uid) != (node.node_name, node.node_uid):
            problem = f"belongs to a pod on node {pod.node_name}, but the driver on node {node.node_name} sent it"
            hint = "" if pod.node_name != node.node_name else "the node was deleted and created again with this name"
            raise token_rejected(_POD_TOKEN, problem, hint)
        return pod
