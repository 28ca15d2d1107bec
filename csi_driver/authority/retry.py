"""Repeat an operation: retry it after failures, or run it periodically."""

from __future__ import annotations

import asyncio
import random
import time
from collections.abc import Awaitable, Callable
from typing import TypeVar

from csi_driver.core.backoff import Backoff
from csi_driver.core.errors import CertmountError, FailureKind

_T = TypeVar("_T")

CLUSTER_RETRY_S = 20.0  # long enough for an API server to restart; the node driver waits 90 s for the authority
CLUSTER_BACKOFF = Backoff(0.25, 4.0, jitter=0.5)


async def retry(
    operation: Callable[[], Awaitable[_T]], backoff: Backoff, on_failure: Callable[[CertmountError, float], None]
) -> _T:
    """Return the result of the operation; repeat it after each retryable failure.

    ``on_failure`` gets each of them with the delay before the next attempt, and raises it to stop.
    """
    failures = 0
    while True:
        try:
            return await operation()
        except CertmountError as error:
            if not error.retryable:
                raise
            failures += 1
            # Many callers start to wait when a server becomes unavailable, so jitter spreads their retries.
            delay_s = backoff.delay_s(failures, random.random())  # noqa: S311  # not a secret
            on_failure(error, delay_s)
        await asyncio.sleep(delay_s)


async def retry_while_unavailable(query: Callable[[], Awaitable[_T]]) -> _T:
    """Return the result of a query to the API server; repeat it for 20 s while the API server is unavailable."""
    deadline = time.monotonic() + CLUSTER_RETRY_S

    def stop_at_deadline(error: CertmountError, delay_s: float) -> None:
        if error.reason.kind is not FailureKind.UNAVAILABLE or time.monotonic() + delay_s >= deadline:
            raise error

    return await retry(query, CLUSTER_BACKOFF, stop_at_deadline)


async def run_periodically(
    interval_s: float, operation: Callable[[], Awaitable[object]], on_failure: Callable[[CertmountError], None]
) -> None:
    """Run the operation every ``interval_s`` seconds, first after one interval, until cancelled."""
    while True:
        await asyncio.sleep(interval_s)
        try:
            await operation()
        except CertmountError as error:
            on_failure(error)
