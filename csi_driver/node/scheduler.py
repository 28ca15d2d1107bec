"""A scheduler that runs one action per key when its due time comes."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field

from csi_driver.core.due_times import DueTimes

MAX_CONCURRENT_ACTIONS = 8
_LONGEST_SLEEP_S = 60.0
"""The wall clock can change and the machine can be suspended, so check the due times at least this often."""


@dataclass(eq=False)
class Scheduler:
    """Calls ``action(key)`` when the key's due time comes, for at most ``limit`` keys at the same time.

    Due times are unix seconds of ``clock``. If that clock is set back, a key is due when the seconds that it had left have
    passed. An action must not raise.
    """

    clock: Callable[[], float]
    action: Callable[[str], Awaitable[None]]
    limit: float = MAX_CONCURRENT_ACTIONS
    elapsed: Callable[[], float] = time.monotonic
    _running: int = 0
    _due_times: DueTimes = field(default_factory=DueTimes)
    _due_by_elapsed: DueTimes = field(default_factory=DueTimes)  # the same keys, by ``elapsed``
    _wake: asyncio.Event = field(default_factory=asyncio.Event)

    def schedule(self, key: str, due: float) -> None:
        """Set the due time of a key. It replaces an earlier one."""
        self._due_times.schedule(key, due)
        self._due_by_elapsed.schedule(key, self.elapsed() + due - self.clock())
        self._wake.set()

    def cancel(self, key: str) -> None:
        """Remove a key. An action that is running continues."""
        self._due_times.cancel(key)
        self._due_by_elapsed.cancel(key)

    def due(self, key: str) -> float | None:
        """Return the due time of a key, or None if it has none, for example while its action runs."""
        return self._due_times.due(key)

    def _take(self) -> str | None:
        key = self._due_times.take(self.clock()) or self._due_by_elapsed.take(self.elapsed())
        if key is not None:
            self.cancel(key)
        return key

    async def run(self) -> None:
        async with asyncio.TaskGroup() as actions:
            while True:
                self._wake.clear()
                wait_s = _LONGEST_SLEEP_S
                while self._running < self.limit:
                    if (key := self._take()) is None:
                        left_s = self._due_by_elapsed.wait_s(self.elapsed())
                        wait_s = min(self._due_times.wait_s(self.clock()), left_s, wait_s)
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
