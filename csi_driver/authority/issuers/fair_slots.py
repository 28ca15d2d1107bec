"""Slots of a resource for which requests wait, with shares by owner."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Sequence

from csi_driver.core.shares import FairShares


class FairSlots:
    """Lets a request wait until its owners' share has a free slot. So an owner that fills its share delays only itself."""

    def __init__(self, resource: str, capacity: int, wait_s: float) -> None:
        self._shares = FairShares(resource, capacity)
        self._wait_s = wait_s
        self._released = asyncio.Event()

    @contextlib.asynccontextmanager
    async def hold(self, owners: Sequence[str]) -> AsyncIterator[None]:
        """Hold a slot while the block runs; raise CertmountError ShareExceeded if none becomes free in time."""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(self._wait_s):
                while not self._shares.fits(owners):
                    await self._released.wait()
        with self._shares.hold(owners):
            try:
                yield
            finally:
                self._released.set()
                self._released = asyncio.Event()
