"""Wait until the API server serves an API, which an upgrade of the cluster can add."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable

import structlog

from csi_driver.authority.retry import retry
from csi_driver.core.backoff import Backoff
from csi_driver.core.errors import CertmountError

log = structlog.get_logger(__name__)

_RETRY = Backoff(5, 60)
_NOT_SERVED_S = 600.0  # the API server may be upgraded


async def wait_until_served(
    find: Callable[[], Awaitable[str]], *, delayed: str, not_served: str, **details: str
) -> str:
    """Return the version of the API that ``find`` finds.

    Logs ``delayed`` for each failure, and ``not_served`` with ``details`` once.
    """

    def log_delay(error: CertmountError, delay_s: float) -> None:
        log.warning(delayed, error=str(error), retry_in_s=delay_s)

    logged = False
    while not (version := await retry(find, _RETRY, log_delay)):
        if not logged:
            log.warning(not_served, **details)
            logged = True
        await asyncio.sleep(_NOT_SERVED_S)
    return version
