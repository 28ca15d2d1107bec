"""One clock for all volumes: a heap of moments, and a bounded number of renewals side by side."""

from __future__ import annotations

import asyncio
import heapq
from collections.abc import Awaitable, Callable

_SIDE_BY_SIDE = 8
"""Renewals at once: enough to use an authority well after an outage, few enough to leave the node to its pods."""
_LONGEST_NAP_S = 60.0
"""The wall clock may be set, or the machine sleep; look again at least this often."""


class Rotation:
    """Calls ``renew(volume_id)`` when a volume's moment has come. Moments are unix seconds by ``clock``."""

    def __init__(self, clock: Callable[[], float], renew: Callable[[str], Awaitable[None]]) -> None:
        self._clock = clock
        self._renew = renew
        self._heap: list[tuple[float, str]] = []
        # The truth; entries of the heap that differ from it are outdated and skipped.
        self._due: dict[str, float] = {}
        self._wake = asyncio.Event()

    def schedule(self, volume_id: str, when: float) -> None:
        """Sets the volume's moment; an earlier one is forgotten."""
        self._due[volume_id] = when
        heapq.heappush(self._heap, (when, volume_id))
        if self._heap[0] == (when, volume_id):
            self._wake.set()
        if len(self._heap) > 2 * len(self._due) + 64:
            self._heap = [(moment, volume) for volume, moment in self._due.items()]
            heapq.heapify(self._heap)

    def cancel(self, volume_id: str) -> None:
        """Forgets the volume."""
        self._due.pop(volume_id, None)

    def due(self, volume_id: str) -> float | None:
        """The volume's moment; None while it is being renewed or is unknown."""
        return self._due.get(volume_id)

    async def run(self) -> None:
        """Renews until cancelled."""
        places = asyncio.Semaphore(_SIDE_BY_SIDE)
        async with asyncio.TaskGroup() as renewals:
            while True:
                await places.acquire()
                volume_id = await self._next()
                renewals.create_task(self._renew_one(volume_id, places), name=f"renew {volume_id}")

    async def _renew_one(self, volume_id: str, places: asyncio.Semaphore) -> None:
        try:
            await self._renew(volume_id)
        finally:
            places.release()

    async def _next(self) -> str:
        """Waits for the next volume whose moment has come and takes it out."""
        while True:
            self._wake.clear()
            while self._heap and self._due.get(self._heap[0][1]) != self._heap[0][0]:
                heapq.heappop(self._heap)
            wait = _LONGEST_NAP_S
            if self._heap:
                moment, volume_id = self._heap[0]
                wait = min(moment - self._clock(), _LONGEST_NAP_S)
                if wait <= 0:
                    heapq.heappop(self._heap)
                    del self._due[volume_id]
                    return volume_id
            try:
                await asyncio.wait_for(self._wake.wait(), wait)
            except TimeoutError:
                continue
