"""From a token to a proven identity: verified offline first, which costs no one anything, then reviewed by the live cluster."""

from __future__ import annotations

import asyncio
import functools
import hashlib
import random
import time
from collections import OrderedDict
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Protocol, TypeVar

from csi_driver.authority.authn.token_verifier import TokenVerifier
from csi_driver.core.cluster.token_review import ReviewedToken
from csi_driver.core.errors import CertmountError, Fault, Reason
from csi_driver.core.identity import PodIdentity
from csi_driver.core.secret import Secret
from csi_driver.telemetry.authority_metrics import AuthorityMetrics

_T = TypeVar("_T")

_KEPT_S = 5.0
"""How long a review counts: the token of a deleted pod works that much longer, and 70 volumes of a node need one review."""
_MOST_KEPT = 20_000
_PATIENCE_S = 20.0
"""How long a call waits for an API server that can't be asked: one that restarts costs no pod a failure. A node waits 90 s for us."""
_FIRST_PAUSE_S, _PAUSE_CAP_S = 0.25, 4.0
_FAILURE_COUNTS_S = 30.0
"""Whom no one asks can't know whether the API server is back: so a failure tells about that long."""


class TokenReviewer(Protocol):
    """Asks the cluster whether a token is live."""

    async def review(self, token: Secret[str], audience: str) -> ReviewedToken | None:
        """The token's owner; None where there is no cluster to ask.

        Raises:
            CertmountError: TokenRejected where the cluster says no, TokenReviewUnavailable where it can't be asked.
        """


class OfflineReviewer:
    """Outside a cluster no one knows whether a pod still lives: there a token counts until it expires."""

    async def review(self, token: Secret[str], audience: str) -> None:
        """Asks no one."""


@dataclass(frozen=True, slots=True)
class _Outcome:
    """What a proof came to: an identity, or why not."""

    result: PodIdentity | CertmountError
    until: float
    """Unix seconds."""

    def unwrap(self) -> PodIdentity:
        if isinstance(self.result, CertmountError):
            # A new exception for each caller: a shared one would gather the tracebacks of all.
            raise CertmountError(self.result.reason, *self.result.faults)
        return self.result


class TokenReviewCache:
    """Proves tokens, each by one review at a time; what a review said counts for a few seconds, never past the token's end."""

    def __init__(
        self,
        verifier: TokenVerifier,
        reviewer: TokenReviewer,
        metrics: AuthorityMetrics,
        clock: Callable[[], float] = time.time,
    ) -> None:
        self._verifier = verifier
        self._reviewer = reviewer
        self._metrics = metrics
        self._clock = clock
        self._kept: OrderedDict[bytes, _Outcome] = OrderedDict()
        self._flights: dict[bytes, asyncio.Future[_Outcome]] = {}
        self._failed_first: float | None = None
        self._failed_last = 0.0

    @property
    def failing_since(self) -> float | None:
        """Since when (Unix seconds) each review has failed; None after one that was answered, or when none failed of late."""
        return self._failed_first if self._clock() - self._failed_last < _FAILURE_COUNTS_S else None

    async def prove(self, token: Secret[str], audience: str, which: str) -> PodIdentity:
        """The identity behind a token; ``which`` names the token in errors.

        Raises:
            CertmountError: as :meth:`TokenVerifier.verify` and :meth:`TokenReviewer.review`.
        """
        key = hashlib.sha256(f"{audience}\n{token.reveal()}".encode(errors="surrogatepass")).digest()
        verified: PodIdentity | None = None
        while True:
            kept = self._kept.get(key)
            if kept is not None and self._clock() < kept.until:
                return kept.unwrap()
            if verified is None:
                # What fails here is not kept: made-up tokens must not push out proofs.
                verified = await self._verifier.verify(token, audience, which)
                continue
            flight = self._flights.get(key)
            if flight is None:
                return (await self._fly(key, token, audience, which, verified)).unwrap()
            await asyncio.wait([flight])
            if not flight.cancelled():
                return flight.result().unwrap()
            # Whoever asked was called off; one of those who waited asks again.

    async def _fly(self, key: bytes, token: Secret[str], audience: str, which: str, identity: PodIdentity) -> _Outcome:
        flight = self._flights[key] = asyncio.get_running_loop().create_future()
        try:
            until = self._clock() + _KEPT_S
            try:
                await self._review(token, audience, which, identity)
                outcome = _Outcome(identity, min(until, identity.expires_at))
            except CertmountError as error:
                # No dead token comes to life, so a refusal counts as long; what may pass is asked again.
                outcome = _Outcome(error, 0.0 if error.retryable else until)
            if outcome.until:
                self._keep(key, outcome)
            flight.set_result(outcome)
        finally:
            del self._flights[key]
            flight.cancel()
        return outcome

    async def _review(self, token: Secret[str], audience: str, which: str, identity: PodIdentity) -> None:
        try:
            reviewed = await retry_while_unavailable(functools.partial(self._ask, token, audience))
        except CertmountError as error:
            raise CertmountError(error.reason, *(Fault(which, str(fault)) for fault in error.faults)) from None
        if reviewed is not None:
            _check_agreement(identity, reviewed, which)

    async def _ask(self, token: Secret[str], audience: str) -> ReviewedToken | None:
        started = time.perf_counter()
        try:
            reviewed = await self._reviewer.review(token, audience)
        except CertmountError as error:
            if error.retryable:
                self._metrics.proof_failures.labels("review").inc()
                self._failed_last = self._clock()
                self._failed_first = self._failed_first or self._failed_last
            else:
                self._failed_first = None
            raise
        else:
            self._failed_first = None
        finally:
            self._metrics.review_seconds.observe(time.perf_counter() - started)
        return reviewed

    def _keep(self, key: bytes, outcome: _Outcome) -> None:
        now = self._clock()
        self._kept[key] = outcome
        self._kept.move_to_end(key)
        while len(self._kept) > _MOST_KEPT or next(iter(self._kept.values())).until <= now:
            self._kept.popitem(last=False)
            if not self._kept:
                break


async def retry_while_unavailable(ask: Callable[[], Awaitable[_T]]) -> _T:
    """What the cluster answers, asked again for a while where it can't be asked; the caller's own deadline calls this off.

    Raises:
        CertmountError: as ``ask`` does at once for what is final, and at last for what may pass.
    """
    give_up = time.monotonic() + _PATIENCE_S
    pause = _FIRST_PAUSE_S
    while True:
        try:
            return await ask()
        except CertmountError as error:
            if error.reason is not Reason.TOKEN_REVIEW_UNAVAILABLE or time.monotonic() + pause >= give_up:
                raise
        # Apart from each other, as all that wait here began to wait at the same moment.
        await asyncio.sleep(pause * random.uniform(0.5, 1.5))  # noqa: S311  # spreads load, keeps no secret
        pause = min(pause * 2, _PAUSE_CAP_S)


def _check_agreement(identity: PodIdentity, reviewed: ReviewedToken, which: str) -> None:
    """Claims and cluster must say the same in every field: a token made for one pod must not pass for its successor."""
    claimed = {
        "service account": (identity.service_account.username, reviewed.username),
        "service account's uid": (identity.service_account_uid, reviewed.uid),
        "pod": (identity.pod_name, reviewed.pod_name),
        "pod's uid": (identity.pod_uid, reviewed.pod_uid),
        "node": (identity.node_name, reviewed.node_name),
        "node's uid": (identity.node_uid, reviewed.node_uid),
    }
    faults = [
        Fault(which, f"its claims name another {what} than the API server does")
        for what, (claim, answer) in claimed.items()
        if claim != answer
    ]
    if faults:
        raise CertmountError(Reason.TOKEN_REJECTED, *faults)
