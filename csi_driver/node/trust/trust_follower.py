"""Follows what the authority trusts, so that a pod trusts a new root within seconds, and tells it what has arrived."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from typing import Protocol

import structlog

from csi_driver.core.errors import CertmountError, FailureKind, Reason
from csi_driver.core.renewal import retry_delay_s
from csi_driver.node.authority_messages import TrustBundle

log = structlog.get_logger(__name__)

_CONFIRM_SPREAD_S = 10.0
"""Over which chance spreads the confirmations of a change: all nodes hear of it in the same moment."""


class TrustSource(Protocol):
    """Whoever tells what is to be trusted, and hears what is."""

    def watch_trust(self) -> AsyncIterator[TrustBundle]:
        """As :meth:`csi_driver.node.authority_client.AuthorityClient.watch_trust`."""

    async def confirm_trust(self, name: str, generation: int) -> None:
        """As :meth:`csi_driver.node.authority_client.AuthorityClient.confirm_trust`."""


class Holdings(Protocol):
    """Whoever knows what the volumes hold."""

    def held(self) -> Mapping[str, int]:
        """As :meth:`csi_driver.node.trust.root_distribution.RootDistribution.held`."""

    async def moved(self) -> None:
        """As :meth:`csi_driver.node.trust.root_distribution.RootDistribution.moved`."""


async def follow_trust(
    source: TrustSource,
    take: Callable[[TrustBundle], None],
    holdings: Holdings,
    rng: Callable[[], float],
) -> None:
    """Hands every bundle to ``take`` and confirms what the volumes hold; asks again with backoff where the stream ends.

    Runs until cancelled. A confirmation that fails ends the stream, and the next one confirms everything anew.
    """
    attempt = 0

    def taken(bundle: TrustBundle) -> None:
        nonlocal attempt
        take(bundle)
        attempt = 0

    while True:
        try:
            await _first_end(_watch(source, taken), _confirm(source, holdings, rng))
        except CertmountError as error:
            if attempt == 0:
                log.warning("roots not followed", reason=error.reason.word, error=str(error))
        except Exception as error:  # noqa: BLE001  # renewals must outlive a defect here; its text may quote a token
            log.error("roots not followed", reason=Reason.INTERNAL.word, error=type(error).__name__)  # noqa: TRY400  # likewise
        attempt += 1
        await asyncio.sleep(retry_delay_s(attempt=attempt, kind=FailureKind.UNAVAILABLE, jitter=rng()))


async def _watch(source: TrustSource, taken: Callable[[TrustBundle], None]) -> None:
    async for bundle in source.watch_trust():
        taken(bundle)


async def _confirm(source: TrustSource, holdings: Holdings, rng: Callable[[], float]) -> None:
    """Confirms each set once it is held, and again with each newer state of it."""
    confirmed: dict[str, int] = {}
    while True:
        news = {name: each for name, each in holdings.held().items() if each > confirmed.get(name, -1)}
        # The first ones follow the connection, whose moment is the node's own already.
        if news.keys() & confirmed.keys():
            await asyncio.sleep(rng() * _CONFIRM_SPREAD_S)
        for name, generation in news.items():
            await source.confirm_trust(name, generation)
            log.info("roots confirmed", set=name, generation=generation)
            confirmed[name] = generation
        if not news:
            await holdings.moved()


async def _first_end(*parts: Awaitable[None]) -> None:
    """Runs the parts side by side until the first one ends, and ends as it does."""
    tasks = [asyncio.ensure_future(part) for part in parts]
    try:
        done, _ = await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.wait(tasks)
    for task in done:
        task.result()
