"""When each of many keys is due."""

from __future__ import annotations

import heapq
import math


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

    def due(self, key: str) -> float | None:
        return self._due.get(key)

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
