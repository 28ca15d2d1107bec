"""Elect one replica as the leader with a Kubernetes Lease."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import Awaitable, Callable, Coroutine
from dataclasses import dataclass
from typing import Any, Protocol

import structlog

from csi_driver.core.cluster.objects import Lease
from csi_driver.core.errors import CertmountError

log = structlog.get_logger(__name__)

LEASE_S = 30  # until another replica takes over from one that crashed; a replica that stops releases the lease
_RENEW_INTERVAL_S = 10.0
_ACQUIRE_INTERVAL_S = 5.0
_RENEW_DEADLINE_S = 20.0
"""A leader that cannot renew the lease stops its work 10 s before another replica can acquire the lease, also during an attempt."""
_RETRY_S = 2.0


class LeaseStore(Protocol):
    """One lease that all replicas share. Both methods raise CertmountError."""

    async def load(self) -> Lease: ...

    async def save(self, lease: Lease) -> bool:
        """Replace the lease; return False if it has changed since it was loaded."""


@dataclass(eq=False)
class LeaderElection:
    """Competes for the lease and runs the leader's work. ``holder`` is the unique name of this replica."""

    store: LeaseStore
    holder: str
    clock: Callable[[], float] = time.monotonic
    sleep: Callable[[float], Awaitable[None]] = asyncio.sleep

    def __post_init__(self) -> None:
        self._seen = Lease("", 0, "")
        self._seen_at = self._renewed_at = 0.0
        self._logged_error = ""

    async def run(self, work: Callable[[], Coroutine[Any, Any, None]]) -> None:
        """Run ``work`` while this replica holds the lease and cancel it afterwards, until cancelled."""
        while True:
            if await self._acquire():
                log.info("leadership acquired", holder=self.holder)
                await self._lead(work)
                log.warning("leadership lost", holder=self.holder)
            await self.sleep(_ACQUIRE_INTERVAL_S)

    async def _lead(self, work: Callable[[], Coroutine[Any, Any, None]]) -> None:
        task = asyncio.create_task(work(), name="leader")
        try:
            await self._renew_while_running(task)
        finally:
            task.cancel()
            await asyncio.wait([task])
            # Shielded, so that a replica that stops also releases the lease.
            await asyncio.shield(asyncio.ensure_future(self._release()))
        if not task.cancelled() and (defect := task.exception()) is not None:
            # The other work of this replica continues.
            log.error("the leader's work failed", exc_info=defect)

    async def _renew_while_running(self, task: asyncio.Task[None]) -> None:
        while not task.done() and (left_s := _RENEW_DEADLINE_S - self._age_s()) > 0:
            # The deadline also ends an attempt: its three requests can take 5 s each.
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(left_s):
                    await self.sleep(max(_RENEW_INTERVAL_S - self._age_s(), _RETRY_S))
                    if not await self._acquire() and self._seen.holder != self.holder:
                        return

    def _age_s(self) -> float:
        """Return the time since the last renewal began."""
        return self.clock() - self._renewed_at

    async def _acquire(self) -> bool:
        """Acquire or renew the lease; return False if another replica holds it or the API server is unavailable."""
        started = self.clock()
        try:
            found = await self.store.load()
            if found.version != self._seen.version:
                self._seen, self._seen_at = found, self.clock()
            # Uses the time since this replica saw a change, not the time in the lease: clocks differ.
            held = found.holder not in ("", self.holder) and self.clock() - self._seen_at <= found.seconds
            acquired = not held and await self.store.save(Lease(self.holder, LEASE_S, found.version))
        except CertmountError as error:
            if str(error) != self._logged_error:
                self._logged_error = str(error)
                log.warning("leader election failed", error=str(error))
            return False
        self._logged_error = ""
        if acquired:
            self._renewed_at = started
            self._seen = Lease(self.holder, LEASE_S, found.version)
        return acquired

    async def _release(self) -> None:
        with contextlib.suppress(CertmountError):  # otherwise it expires
            found = await self.store.load()
            if found.holder == self.holder:
                await self.store.save(Lease("", LEASE_S, found.version))
