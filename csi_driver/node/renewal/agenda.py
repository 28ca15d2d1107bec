"""When each volume's moment is, and which of those whose moment has come is first. Pure: the time is an argument."""

from __future__ import annotations

import heapq
import math
from collections.abc import Callable, Iterator


class Agenda:
    """A moment for each volume, and until when it can wait at most: of several whose moment has come, the most urgent is first."""

    def __init__(self) -> None:
        # The truth; entries of the heaps that differ from it are outdated and skipped.
        self._moments: dict[str, tuple[float, float]] = {}
        self._later: list[tuple[float, str, float]] = []
        self._ready: list[tuple[float, str, float]] = []

    def __len__(self) -> int:
        return len(self._moments)

    def schedule(self, volume_id: str, when: float, until: float = math.inf) -> None:
        """Sets the volume's moment; an earlier one is forgotten."""
        self._moments[volume_id] = when, until
        heapq.heappush(self._later, (when, volume_id, until))
        if len(self._later) + len(self._ready) > 2 * len(self._moments) + 64:
            self._later = [(moment, volume, latest) for volume, (moment, latest) in self._moments.items()]
            self._ready = []
            heapq.heapify(self._later)

    def cancel(self, volume_id: str) -> None:
        """Forgets the volume."""
        self._moments.pop(volume_id, None)

    def due(self, volume_id: str) -> float | None:
        """The volume's moment; None for one that was taken or is unknown."""
        return self._moments.get(volume_id, (None, None))[0]

    def wait_s(self, now: float) -> float:
        """Seconds until a volume's moment has come; 0 where one has, infinite where there is none."""
        self._sort(now)
        if self._ready:
            return 0.0
        return self._later[0][0] - now if self._later else math.inf

    def take(self, now: float) -> str | None:
        """Takes the most urgent volume whose moment has come out of it."""
        self._sort(now)
        if not self._ready:
            return None
        _, volume_id, _ = heapq.heappop(self._ready)
        del self._moments[volume_id]
        return volume_id

    def left_s(self, now: float) -> float:
        """Seconds that the most urgent volume whose moment has come can wait; infinite where there is none."""
        self._sort(now)
        return self._ready[0][0] - now if self._ready else math.inf

    def backlog(self, now: float) -> int:
        """How many volumes' moments have come. Also from another thread."""
        return sum(when <= now for when, _ in list(self._moments.values()))

    def put_off(self, now: float, delay_s: Callable[[float], float]) -> None:
        """Sets the moments of all that are due anew: in ``delay_s(seconds it can wait)``."""
        for volume_id, until in list(self._all_due(now)):
            self.schedule(volume_id, now + delay_s(until - now), until)

    def _all_due(self, now: float) -> Iterator[tuple[str, float]]:
        return ((volume_id, until) for volume_id, (when, until) in self._moments.items() if when <= now)

    def _sort(self, now: float) -> None:
        """Moves what is due to the heap by urgency, and drops what is outdated at the head of both."""
        while self._later and self._later[0][0] <= now:
            when, volume_id, until = heapq.heappop(self._later)
            if self._moments.get(volume_id) == (when, until):
                heapq.heappush(self._ready, (until, volume_id, when))
        while self._later and self._moments.get(self._later[0][1]) != (self._later[0][0], self._later[0][2]):
            heapq.heappop(self._later)
        while self._ready and self._moments.get(self._ready[0][1]) != (self._ready[0][2], self._ready[0][0]):
            heapq.heappop(self._ready)
