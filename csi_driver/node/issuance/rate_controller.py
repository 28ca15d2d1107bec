"""Limits the issuance requests that a node sends to one issuer to what the issuer can handle.

After an outage, the retries of thousands of nodes could overload an authority again. During an outage, a node therefore
sends one probe at a time, with growing pauses. Otherwise the concurrency limit follows the additive increase,
multiplicative decrease of TCP (RFC 5681): each round of responses adds one concurrent request; an overload halves the limit
and starts a pause. Pure: times are arguments, in seconds of a monotonic clock.
"""

from __future__ import annotations

import math
from collections.abc import Callable

from csi_driver.core.errors import CertmountError, Scope
from csi_driver.core.renewal import probe_delay_s

_RESPONSES_PER_FAILURE = 8
"""Responses that undo one failure, so that the nodes of a busy authority do not all return after their first success."""


class RateController:
    """The concurrency limit and the pauses of one class of requests to one issuer."""

    def __init__(self, rng: Callable[[], float], max_limit: int, initial_limit: float = 1.0) -> None:
        self._rng = rng
        self._max_limit = max_limit
        self._limit = initial_limit
        self._in_progress = 0
        # Consecutive failures, less those that responses have undone.
        self._failures = 0.0
        self._paused_at = -math.inf
        self._pause_jitter = 0.0
        self._outage_since: float | None = None
        self.epoch = 0  # The number of pauses. The failure of a request from an earlier epoch is no news.
        self.outage: CertmountError | None = None
        """The failure that every request to the issuer would have now, or None."""

    def begin(self) -> None:
        self._in_progress += 1

    def end(self) -> None:
        self._in_progress -= 1

    def wait_s(self, now: float, left_s: float) -> float:
        """Return the seconds until a request can start; infinity if another request must end first.

        ``left_s`` is the time until the certificate of the first waiting request expires.
        """
        if self._in_progress >= math.floor(self._limit):
            return math.inf
        return self.pause_s(now, left_s)

    def pause_s(self, now: float, left_s: float) -> float:
        if not self._failures:
            return 0.0
        pause_s = probe_delay_s(attempt=self._failures, left_s=left_s, jitter=self._pause_jitter)
        return max(self._paused_at + pause_s - now, 0.0)

    def record(self, epoch: int, error: CertmountError | None, now: float) -> float | None:
        """Record the result of a request that started in ``epoch``. Return the outage's seconds if this result ends one."""
        scope = error.reason.kind.scope if error is not None else None
        if scope is Scope.CALLER:  # The limit of one pod, namespace or node: other requests are not affected.
            return None
        if error is not None and scope in (Scope.ISSUER, Scope.LOAD):
            self._slow_down(epoch, error, now)
            return None
        if self._outage_since is None:
            self._limit = min(self._limit + 1 / self._limit, self._max_limit)
            self._failures = max(self._failures - 1 / _RESPONSES_PER_FAILURE, 0.0)
            return None
        outage_s = now - self._outage_since
        self._outage_since, self.outage = None, None
        self._limit, self._failures = 1.0, 0.0
        return outage_s

    def _slow_down(self, epoch: int, error: CertmountError, now: float) -> None:
        # Requests of a class without pauses continue during a pause. They must not extend it again and again.
        if epoch != self.epoch or self.pause_s(now, 0.0) > 0:
            return
        self._limit = max(self._limit / 2, 1.0)
        if error.reason.kind.scope is Scope.ISSUER:
            self._outage_since = now if self._outage_since is None else self._outage_since
            self.outage = error
            self._limit = 1.0
        self.epoch += 1
        self._failures += 1
        self._paused_at, self._pause_jitter = now, self._rng()
