"""Follows the authority's roots, so that a pod trusts a new one within seconds and without a new certificate."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from typing import Protocol

import structlog
from cryptography import x509

from csi_driver.core.bundle import parse_certificates
from csi_driver.core.errors import CertmountError, Kind, Reason
from csi_driver.core.renewal import retry_delay_s

log = structlog.get_logger(__name__)


class TrustSource(Protocol):
    """Whoever tells the roots."""

    def watch_trust(self) -> AsyncIterator[Sequence[bytes]]:
        """As :meth:`csi_driver.node.authority_client.AuthorityClient.watch_trust`."""


async def follow_trust(
    source: TrustSource,
    replace_roots: Callable[[Sequence[x509.Certificate]], Awaitable[None]],
    chance: Callable[[], float],
) -> None:
    """Hands every new set of roots to ``replace_roots``; asks again with backoff where the stream ends. Runs until cancelled."""
    attempt = 0
    while True:
        try:
            async for roots in source.watch_trust():
                await replace_roots(parse_certificates(roots, "roots"))
                attempt = 0
        except CertmountError as error:
            if attempt == 0:
                log.warning("roots not followed", reason=error.reason.word, error=str(error))
        except Exception as error:  # noqa: BLE001  # renewals must outlive a defect here; its text may quote a token
            log.error("roots not followed", reason=Reason.INTERNAL.word, error=type(error).__name__)  # noqa: TRY400  # likewise
        attempt += 1
        await asyncio.sleep(retry_delay_s(attempt=attempt, kind=Kind.UNAVAILABLE, chance=chance()))
