"""One clock for many volumes: sleeps until a moment has come, and keeps a bounded number of calls side by side."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Awaitable, Callable

from csi_driver.node.issuance.pace import SIDE_BY_SIDE, Pace
from csi_driver.node.renewal.agenda import Agenda

_LONGEST_NAP_S = 60.0
"""The wall clock may be set, or the machine sleep; look again at least this often."""


def wait_s(agenda: Agenda, pace: Pace, now: float, monotonic: float) -> float:
    """Seconds until the next volume may have its turn: first its moment must come, then a place be free."""
    until_due = agenda.wait_s(now)
    return until_due if until_due > 0 else pace.wait_s(monotonic, agenda.left_s(now))


class Rotation:
    """Calls ``act(volume_id)`` when a volume's moment has come. Moments are unix seconds by ``clock``.

    ``pace`` says how many calls may run side by side now; without one, eight.
    """

    def __init__(
        self, clock: Callable[[], float], act: Callable[[str], Awaitable[None]], pace: Pace | None = None
    ) -> None:
        self._clock = clock
        self._act = act
        self._pace = pace or Pace(lambda: 0.5, SIDE_BY_SIDE)
        self._agenda = Agenda()
        self._wake = asyncio.Event()

    def schedule(self, volume_id: str, when: float, until: float = float("inf")) -> None:
        """Sets the volume's moment; an earlier one is forgotten. Of several that have come, the least ``until`` is first."""
        self._agenda.schedule(volume_id, when, until)
        self._wake.set()

    def cancel(self, volume_id: str) -> None:
        """Forgets the volume."""
        self._agenda.cancel(volume_id)

    def due(self, volume_id: str) -> float | None:
        """The volume's moment; None while it is acted on or is unknown."""
        return self._agenda.due(volume_id)

    def backlog(self) -> int:
        """How many volumes' moments have come and wait."""
        return self._agenda.backlog(self._clock())

    def put_off(self, delay_s: Callable[[float], float]) -> None:
        """Sets the moments of all that wait anew: in ``delay_s(seconds it can wait)``."""
        self._agenda.put_off(self._clock(), delay_s)
        self._wake.set()

    def left_s(self) -> float:
        """Seconds that the most urgent of those that wait can do so."""
        return self._agenda.left_s(self._clock())

    def look(self) -> None:
        """Looks whether there is something to do: the pace has changed."""
        self._wake.set()

    async def run(self) -> None:
        """Acts until cancelled."""
        monotonic = asyncio.get_running_loop().time
        async with asyncio.TaskGroup() as acts:
            while True:
                self._wake.clear()
                now = self._clock()
                wait = wait_s(self._agenda, self._pace, now, monotonic())
                if wait <= 0 and (volume_id := self._agenda.take(now)) is not None:
                    self._pace.begin()
                    acts.create_task(self._act_on(volume_id), name=f"act on {volume_id}")
                    continue
                # Not wait_for: before Python 3.12 it loses a cancellation that comes together with what it waits for.
                with contextlib.suppress(TimeoutError):
                    async with asyncio.timeout(min(wait, _LONGEST_NAP_S)):
                        await self._wake.wait()

    async def _act_on(self, volume_id: str) -> None:
        try:
            await self._act(volume_id)
        finally:
            self._pace.end()
            self._wake.set()
