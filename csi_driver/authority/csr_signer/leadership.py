"""One replica at a time: whoever holds the lease works, and stops before anyone else could begin."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import Awaitable, Callable, Coroutine
from typing import Any

import structlog

from csi_driver.authority.csr_api import LeaseStore
from csi_driver.core.cluster.lease import Lease
from csi_driver.core.errors import CertmountError

log = structlog.get_logger(__name__)

LEASE_S = 30
"""After a replica has died the work is undone for so long, and two looks; one that stops hands over at once."""
_RENEW_S = 10.0
_LOOK_S = 5.0
_GIVE_UP_S = 20.0
"""Without a renewal for so long, the work ends: ten seconds before another replica may take the lease."""
_RETRY_S = 2.0


class Leadership:
    """Competes for the lease, for ever."""

    def __init__(
        self,
        store: LeaseStore,
        holder: str,
        clock: Callable[[], float] = time.monotonic,
        sleep: Callable[[float], Awaitable[None]] = asyncio.sleep,
    ) -> None:
        """``holder`` is this replica's name, no other's."""
        self._store = store
        self._holder = holder
        self._clock = clock
        self._sleep = sleep
        self._seen = Lease("", 0, "")
        self._seen_at = 0.0
        self._renewed_at = 0.0
        self._failing = ""

    async def run(self, work: Callable[[], Coroutine[Any, Any, None]]) -> None:
        """Does the work whenever this replica holds the lease; the work is cancelled when it is lost."""
        while True:
            if await self._take():
                log.info("this replica looks after certificate signing requests", holder=self._holder)
                await self._lead(work)
                log.warning("another replica may look after certificate signing requests now")
            await self._sleep(_LOOK_S)

    async def _lead(self, work: Callable[[], Coroutine[Any, Any, None]]) -> None:
        working = asyncio.create_task(work(), name="certificate signing requests")
        try:
            await self._keep(working)
        finally:
            working.cancel()
            await asyncio.wait([working])
            # Also when this replica stops: the next one needs not wait until the lease has run out.
            await asyncio.shield(asyncio.ensure_future(self._hand_over()))
        if not working.cancelled() and (defect := working.exception()) is not None:
            # No outage of what else the authority does: the point is to be told of it.
            log.error("looking after certificate signing requests failed", exc_info=defect)

    async def _keep(self, working: asyncio.Task[None]) -> None:
        while not working.done() and self._clock() - self._renewed_at < _GIVE_UP_S:
            fresh = self._clock() - self._renewed_at < _RENEW_S
            await self._sleep(_RENEW_S if fresh else _RETRY_S)
            if not await self._take() and self._seen.holder != self._holder:
                return

    async def _take(self) -> bool:
        """Takes or renews the lease, if that is due to this replica."""
        began = self._clock()
        try:
            found = await self._store.load()
            if found.version != self._seen.version:
                self._seen, self._seen_at = found, self._clock()
            # By the time since it was seen to change, not by what is written in it: clocks differ.
            held = found.holder not in ("", self._holder) and self._clock() - self._seen_at <= found.seconds
            taken = not held and await self._store.save(Lease(self._holder, LEASE_S, found.version))
        except CertmountError as error:
            if str(error) != self._failing:
                self._failing = str(error)
                log.warning("the lease for certificate signing requests cannot be used", error=str(error))
            return False
        self._failing = ""
        if taken:
            self._renewed_at = began
            self._seen = Lease(self._holder, LEASE_S, found.version)
        return taken

    async def _hand_over(self) -> None:
        with contextlib.suppress(CertmountError):  # it runs out by itself
            found = await self._store.load()
            if found.holder == self._holder:
                await self._store.save(Lease("", LEASE_S, found.version))
