"""A scheduler that runs one action per key when its due time comes."""

from __future__ import annotations

import asyncio
import contextlib
import heapq
import math
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field

MAX_CONCURRENT_ACTIONS = 8
_LONGEST_SLEEP_S = 60.0
"""The wall clock can change and the machine can be suspended, so check the due times at least this often."""


class DueTimes:
    """The due time of each key, with the next one first. Pure: times are arguments."""

    def __init__(self) -> None:
        # The heap can contain outdated entries. They differ from this mapping and are skipped.
        self._due: dict[str, float] = {}
        self._heap: list[tuple[float, str]] = []

    def __len__(self) -> int:
        return len(self._due)

    def schedule(self, key: str, due: float) -> None:
        """Set the due time of a key. It replaces an earlier one."""
        self._due[key] = due
        heapq.heappush(self._heap, (due, key))
        if len(self._heap) > 2 * len(self._due) + 64:
            self._heap = [(due, key) for key, due in self._due.items()]
            heapq.heapify(self._heap)

    def cancel(self, key: str) -> None:
        self._due.pop(key, None)

    def wait_s(self, now: float) -> float:
        """Return the seconds until the next due time: 0 if it has passed, infinity if there is none."""
        self._drop_outdated()
        return max(self._heap[0][0] - now, 0.0) if self._heap else math.inf

    def take(self, now: float) -> str | None:
        """Remove and return the key with the earliest due time that has passed."""
        if self.wait_s(now) > 0:
            return None
        _, key = heapq.heappop(self._heap)
        del self._due[key]
        return key

    def _drop_outdated(self) -> None:
        while self._heap and self._due.get(self._heap[0][1]) != self._heap[0][0]:
            heapq.heappop(self._heap)


@dataclass(eq=False)
class Scheduler:
    """Calls ``action(key)`` when the key's due time comes, for at most ``limit`` keys at the same time.

    Due times are unix seconds of ``clock``. An action must not raise.
    """

    clock: Callable[[], float]
    action: Callable[[str], Awaitable[None]]
    limit: float = MAX_CONCURRENT_ACTIONS
    _running: int = 0
    _due_times: DueTimes = field(default_factory=DueTimes)
    _wake: asyncio.Event = field(default_factory=asyncio.Event)

    def schedule(self, key: str, due: float) -> None:
        """Set the due time of a key. It replaces an earlier one."""
        self._due_times.schedule(key, due)
        self._wake.set()

    def cancel(self, key: str) -> None:
        """Remove a key. An action that is running continues."""
        self._due_times.cancel(key)

    async def run(self) -> None:
        async with asyncio.TaskGroup() as actions:
            while True:
                self._wake.clear()
                wait_s = _LONGEST_SLEEP_S
                while self._running < self.limit:
                    now = self.clock()
                    if (key := self._due_times.take(now)) is None:
                        wait_s = min(self._due_times.wait_s(now), wait_s)
                        break
                    self._running += 1
                    actions.create_task(self._run(key), name=f"scheduled action for {key}")
                # asyncio.wait_for of Python 3.11 can lose a cancellation, so use a timeout.
                with contextlib.suppress(TimeoutError):
                    async with asyncio.timeout(wait_s):
                        await self._wake.wait()

    async def _run(self, key: str) -> None:
        try:
            await self.action(key)
        finally:
            self._running -= 1
            self._wake.set()
