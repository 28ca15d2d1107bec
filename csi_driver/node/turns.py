"""Lets tenants take turns at work that needs much CPU time."""

from __future__ import annotations

import asyncio
import time
from collections import Counter
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass

from csi_driver.node.fair_queue import FairQueue
from csi_driver.node.pods import Pod

_PAUSE_S = 0.001
_LONGEST_PAUSE_S = 0.05
_IDLE_SHARE = 0.25
_BATCH_S = 0.001  # of work that starts after a pause: each pause costs more than a millisecond
_FEW = 4
_PERIOD_S = 0.02


@dataclass(eq=False, slots=True)
class _Turn:
    pod: Pod
    begins: asyncio.Future[None]
    urgency: float = 0.0
    started: bool = False


class Turns:
    """Starts work in the order of :class:`FairQueue`, with at most ``limit`` turns at a time. Belongs to one event loop.

    With ``when_idle``, a namespace gets more than a few turns only when the event loop is idle: after a millisecond without
    arrivals in which the loop worked for less than a quarter of the time, at the latest after 50 ms. gRPC hands over one call
    after the other, so work on the calls of a burst would delay the arrival of all later calls. And what was started
    occupies the loop again and again until it ends, so it must not be more than the loop can do at the time.
    """

    def __init__(self, limit: int, *, when_idle: bool = False) -> None:
        self._limit = limit
        self._when_idle = when_idle
        self._queue: FairQueue[_Turn] = FairQueue()
        self._running = 0
        self._pause: _Pause | None = None
        self._at_once: Counter[str] = Counter()  # turns of each namespace that started at once in the present period
        self._period_ends = 0.0

    @asynccontextmanager
    async def turn(self, pod: Pod) -> AsyncIterator[None]:
        """Wait for a turn of the pod, which lasts as long as the block."""
        loop = asyncio.get_running_loop()
        turn = _Turn(pod, loop.create_future())
        self._queue.add(turn)
        if self._pause is not None:
            self._pause.arrived = True
        self._start(loop)
        try:
            await turn.begins
            yield
        finally:
            self._queue.end(turn, started=turn.started)
            if turn.started and not turn.begins.cancelled():
                self._running -= 1
            self._start(loop)

    def _start(self, loop: asyncio.AbstractEventLoop) -> None:
        """Start all turns that may start at once, and set a timer if others wait."""
        if loop.time() >= self._period_ends:
            self._at_once.clear()
            self._period_ends = loop.time() + _PERIOD_S
        while self._running < self._limit and self._queue.next(self._has_few_turns) is not None:
            turn = self._start_next(self._has_few_turns)
            self._at_once[turn.pod.namespace] += 1
        if self._running < self._limit and self._pause is None and self._queue.next() is not None:
            self._pause = _Pause(loop, self._pause_ended)

    def _has_few_turns(self, namespace: str) -> bool:
        few = self._at_once[namespace] < _FEW and self._queue.count(namespace) <= _FEW
        return few or not self._when_idle

    def _pause_ended(self, loop: asyncio.AbstractEventLoop) -> None:
        self._pause = None
        self._start_batch(loop, loop.time() + _BATCH_S)

    def _start_batch(self, loop: asyncio.AbstractEventLoop, ends: float) -> None:
        """Start the next turn, and others after it has worked."""
        if self._running < self._limit and self._queue.next() is not None:
            self._start_next()
            if loop.time() < ends:
                loop.call_soon(self._start_batch, loop, ends)
            else:
                self._start(loop)

    def _start_next(self, may_start: Callable[[str], bool] = lambda _namespace: True) -> _Turn:
        turn = self._queue.start_next(may_start)
        turn.started = True
        if not turn.begins.cancelled():  # The caller was cancelled, but has not left the queue yet.
            self._running += 1
            turn.begins.set_result(None)
        return turn


class _Pause:
    """Waits until the event loop is idle, and calls ``ended``."""

    def __init__(self, loop: asyncio.AbstractEventLoop, ended: Callable[[asyncio.AbstractEventLoop], None]) -> None:
        self.arrived = False
        self._ended = ended
        self._latest = loop.time() + _LONGEST_PAUSE_S
        self._begin(loop)

    def _begin(self, loop: asyncio.AbstractEventLoop) -> None:
        self.arrived = False
        self._began, self._used = loop.time(), time.thread_time()
        loop.call_later(_PAUSE_S, self._end, loop)

    def _end(self, loop: asyncio.AbstractEventLoop) -> None:
        now = loop.time()
        busy = time.thread_time() - self._used > (now - self._began) * _IDLE_SHARE
        if (self.arrived or busy) and now < self._latest:
            self._begin(loop)
        else:
            self._ended(loop)
