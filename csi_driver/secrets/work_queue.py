"""Decide which Secret is worked on next: by due time, and fairly between namespaces."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass

from csi_driver.core.due_times import DueTimes
from csi_driver.core.shares import FairShares
from csi_driver.secrets.requests import SecretName

MAX_CONCURRENT = 32
"""Secrets that are worked on at a time. A slow issuer takes minutes for each, so one namespace gets at most half."""
MAX_STARTS_PER_S = 20.0
"""Of one namespace. A tenant can change its Ingresses more often; each of its Secrets is then worked on less often."""
_BURST = 20.0
_LONGEST_SLEEP_S = 60.0
_NEARLY_ONE = 0.999  # clocks have a limited resolution


@dataclass(slots=True)
class _Namespace:
    """The Secrets of a namespace that are due, the next one first, and how many may start now."""

    ready: dict[str, None]
    tokens: float
    refilled_at: float

    def refill(self, now: float) -> None:
        self.tokens = min(_BURST, self.tokens + (now - self.refilled_at) * MAX_STARTS_PER_S)
        self.refilled_at = now


class FairSchedule:
    """Pure: times are arguments, in monotonic seconds. Each Secret is worked on once at a time."""

    def __init__(self) -> None:
        self._due = DueTimes()
        self._due_at: dict[str, float] = {}
        self._namespaces: dict[str, _Namespace] = {}  # the next one first
        self._running: set[str] = set()
        self._again: dict[str, float] = {}  # due times of Secrets that are being worked on
        self._shares = FairShares("Secrets in progress", MAX_CONCURRENT)

    def __len__(self) -> int:
        return len(self._due_at) + len(self._running)

    def schedule(self, key: str, due: float) -> None:
        """Set a due time; an earlier one of the same Secret stays."""
        if key in self._running:
            self._again[key] = min(due, self._again.get(key, due))
        elif due < self._due_at.get(key, float("inf")):
            self._due_at[key] = due
            self._due.schedule(key, due)

    def cancel(self, key: str) -> None:
        """Remove a Secret that waits; one that is being worked on is not affected."""
        if self._due_at.pop(key, None) is None:
            return
        self._due.cancel(key)
        if (namespace := self._namespaces.get(_namespace_of(key))) is not None:
            namespace.ready.pop(key, None)

    def start_next(self, now: float) -> str | None:
        """Return the Secret to work on now: namespaces take turns."""
        self._collect(now)
        for name, namespace in list(self._namespaces.items()):
            namespace.refill(now)
            if not namespace.ready:
                if namespace.tokens >= _BURST:
                    del self._namespaces[name]
            elif namespace.tokens >= _NEARLY_ONE and self._shares.try_take((name,)):
                key = next(iter(namespace.ready))
                del namespace.ready[key], self._due_at[key]
                namespace.tokens -= 1
                self._namespaces[name] = self._namespaces.pop(name)  # behind the others
                self._running.add(key)
                return key
        return None

    def end(self, key: str) -> None:
        """A Secret is no longer worked on."""
        self._running.remove(key)
        self._shares.give_back((_namespace_of(key),))
        if key in self._again:
            self.schedule(key, self._again.pop(key))

    def wait_s(self, now: float) -> float:
        """Return after how many seconds a Secret may be due, if none ends before."""
        waits = [(_NEARLY_ONE - one.tokens) / MAX_STARTS_PER_S for one in self._namespaces.values() if one.ready]
        # A namespace that waits for its share, and not for a token, is served when a Secret ends.
        return min([self._due.wait_s(now), *(max(wait, 0.001) for wait in waits if wait > 0), _LONGEST_SLEEP_S])

    def _collect(self, now: float) -> None:
        while (key := self._due.take(now)) is not None:
            name = _namespace_of(key)
            self._namespaces.setdefault(name, _Namespace({}, _BURST, now)).ready[key] = None


class WorkQueue:
    """Runs ``action`` for each Secret that is due. An action must not raise."""

    def __init__(self, action: Callable[[SecretName], Awaitable[None]]) -> None:
        self._action = action
        self._schedule = FairSchedule()
        self._wake = asyncio.Event()

    def __len__(self) -> int:
        """Return the number of Secrets that wait or are being worked on."""
        return len(self._schedule)

    def schedule(self, secret: SecretName, delay_s: float) -> None:
        """Work on the Secret after a delay, or earlier if it is already due earlier."""
        self._schedule.schedule(str(secret), time.monotonic() + delay_s)
        self._wake.set()

    def cancel(self, secret: SecretName) -> None:
        """Forget a Secret that waits."""
        self._schedule.cancel(str(secret))

    async def run(self) -> None:
        async with asyncio.TaskGroup() as actions:
            while True:
                self._wake.clear()
                while (key := self._schedule.start_next(time.monotonic())) is not None:
                    actions.create_task(self._run(key), name=f"secret {key}")
                with contextlib.suppress(TimeoutError):
                    async with asyncio.timeout(self._schedule.wait_s(time.monotonic())):
                        await self._wake.wait()

    async def _run(self, key: str) -> None:
        try:
            await self._action(SecretName(*key.split("/", 1)))
        finally:
            self._schedule.end(key)
            self._wake.set()


def _namespace_of(key: str) -> str:
    return key.partition("/")[0]
