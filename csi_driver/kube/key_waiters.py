"""Wait until a cache has an object."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable, Hashable
from typing import TypeVar

_T = TypeVar("_T")


class KeyWaiters:
    """The tasks that wait for keys."""

    def __init__(self) -> None:
        self._waiting: dict[Hashable, set[asyncio.Future[None]]] = {}

    def notify(self, key: Hashable) -> None:
        """Wake the tasks that wait for the key."""
        for waiter in self._waiting.get(key, ()):
            if not waiter.done():
                waiter.set_result(None)

    async def wait(self, key: Hashable, find: Callable[[], _T | None], seconds: float) -> _T | None:
        """Return what ``find`` returns, now or after a notification for the key; None after a timeout."""
        found = find()
        if found is not None or seconds <= 0:
            return found
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(seconds):
                while found is None:
                    await self._notification(key)
                    found = find()
        return found

    async def _notification(self, key: Hashable) -> None:
        waiter: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        waiters = self._waiting.setdefault(key, set())
        waiters.add(waiter)
        try:
            await waiter
        finally:
            waiters.discard(waiter)
            if not waiters and self._waiting.get(key) is waiters:
                del self._waiting[key]
