"""Follow the trust bundle of the authority."""

from __future__ import annotations

import asyncio
import random
from collections.abc import AsyncIterator, Callable

import structlog

from csi_driver.core.backoff import Backoff
from csi_driver.core.errors import CertmountError
from csi_driver.rpc.authority_messages import TrustBundle

log = structlog.get_logger(__name__)

_BACKOFF = Backoff(1.0, 30.0, jitter=0.5)


async def follow_trust(
    watch: Callable[[], AsyncIterator[TrustBundle]],
    update: Callable[[TrustBundle], None],
    available: Callable[[], None],
    report: Callable[[bool], None],
) -> None:
    """Pass each bundle to ``update``, and call ``available`` when the authority responds again after a failure.

    ``report`` takes True when a stream delivers a bundle, and False when it ends.
    """
    failures = 0
    while True:
        try:
            async for bundle in watch():
                update(bundle)
                report(True)
                if failures:
                    available()
                failures = 0
        except CertmountError as error:
            if not failures:
                log.warning("trust stream failed", error=str(error))
            failures += 1
        finally:
            report(False)
        await asyncio.sleep(_BACKOFF.delay_s(max(failures, 1), random.random()))  # noqa: S311  # not a secret
