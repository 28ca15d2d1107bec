"""Waiting for an object that a cache is about to hear of."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable, Hashable
from typing import TypeVar

_T = TypeVar("_T")


class Arrivals:
    """Wakes those who wait for a key."""

    def __init__(self) -> None:
        self._waiting: dict[Hashable, set[asyncio.Future[None]]] = {}

    def came(self, key: Hashable) -> None:
        """There is something under the key now."""
        for waiter in self._waiting.get(key, ()):
            if not waiter.done():
                waiter.set_result(None)

    async def wait(self, key: Hashable, look: Callable[[], _T | None], seconds: float) -> _T | None:
        """What ``look`` finds, at once or as soon as the key has come; None when that takes too long."""
        found = look()
        if found is not None or seconds <= 0:
            return found
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(seconds):
                while found is None:
                    await self._next(key)
                    found = look()
        return found

    async def _next(self, key: Hashable) -> None:
        waiter: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        waiters = self._waiting.setdefault(key, set())
        waiters.add(waiter)
        try:
            await waiter
        finally:
            waiters.discard(waiter)
            if not waiters and self._waiting.get(key) is waiters:
                del self._waiting[key]
