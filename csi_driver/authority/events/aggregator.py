"""Which events are to be written, and when: what repeats is counted, and no one is flooded. Pure: time is an argument."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass

from csi_driver.core.cluster.event import PodEvent, RecordedEvent
from csi_driver.core.identity import PodIdentity

WINDOW_S = 600
"""What is said again within it is counted in one event. By the clock's ten minutes, so that replicas agree on them."""
MOST_KEPT = 2000
MOST_PER_POD = 10
"""New events of one pod in a minute: its author writes part of their text, and may write another one each time."""
RATE, BURST = 20.0, 20.0
"""Events written in a second, for the sake of the API server, in all of the cluster."""
_FIRST_REPEAT_S = 30.0
_NEARLY_ONE = 0.999
"""Of a token: unix seconds are floats of a tenth of a microsecond."""

Key = tuple[str, str, str]


@dataclass(slots=True, eq=False)
class AggregatedEvent:
    """One event, and how far the API server knows of it."""

    event: PodEvent
    window: int
    last_at: float
    due: float
    said: int = 1
    told: int = 0
    updates: int = 0
    written: RecordedEvent | None = None

    @property
    def untold(self) -> int:
        return self.said - self.told


class EventAggregator:
    """Events of the last minutes. ``dropped`` is told why each time that one is not to be written."""

    def __init__(self, dropped: Callable[[str], None]) -> None:
        self._dropped = dropped
        self._entries: dict[Key, AggregatedEvent] = {}
        self._minute = 0
        self._of_pod: Counter[str] = Counter()
        self._tokens = BURST
        self._filled_at = 0.0
        self._not_before = 0.0

    def __len__(self) -> int:
        return len(self._entries)

    def note(self, pod: PodIdentity, *, warning: bool, reason: str, message: str, now: float) -> None:
        """Something is to be said on a pod."""
        key, window = (pod.pod_uid, reason, message), int(now // WINDOW_S)
        entry = self._entries.get(key)
        if entry is not None and entry.window == window:
            entry.said += 1
            entry.last_at = now
            return
        if not self._admits(pod.pod_uid, now):
            return
        namespace = pod.service_account.namespace
        name = _name(pod.pod_name, key, window)
        event = PodEvent(name, namespace, pod.pod_name, pod.pod_uid, warning, reason, message, now)
        self._entries[key] = AggregatedEvent(event, window, now, now)

    def wait(self, now: float) -> float | None:
        """Seconds until there is one to write; None while there is none."""
        due = min((entry.due for entry in self._entries.values() if entry.untold), default=None)
        if due is None:
            return None
        self._fill(now)
        for_token = 0.0 if self._tokens >= _NEARLY_ONE else (1 - self._tokens) / RATE
        return max(0.0, due - now, self._not_before - now, for_token)

    def take(self, now: float) -> AggregatedEvent | None:
        """The next one to write now; it has to be settled, or will be taken again. Counts against the rate."""
        self._expire(now)
        if self.wait(now) != 0.0:
            return None
        self._tokens -= 1
        return min((entry for entry in self._entries.values() if entry.untold), key=lambda entry: entry.due)

    def settle(self, entry: AggregatedEvent, told: int, written: RecordedEvent, now: float) -> None:
        """The API server knows that it was said ``told`` times here; the next count goes out later each time."""
        entry.written, entry.told = written, told
        entry.due = now + _FIRST_REPEAT_S * 2**entry.updates
        entry.updates += 1

    def give_up(self, entry: AggregatedEvent, why: str) -> None:
        """It is never written; what repeats it within its window neither."""
        entry.told = entry.said = 0
        entry.due = float("inf")
        self._dropped(why)

    def pause(self, seconds: float, now: float) -> None:
        """Nothing is written for so long."""
        self._not_before = now + seconds

    def _admits(self, uid: str, now: float) -> bool:
        minute = int(now // 60)
        if minute != self._minute:
            self._minute = minute
            self._of_pod.clear()
        self._of_pod[uid] += 1
        if self._of_pod[uid] > MOST_PER_POD:
            self._dropped("pod")
            return False
        if len(self._entries) >= MOST_KEPT:
            self._expire(now)
        if len(self._entries) >= MOST_KEPT:
            self._dropped("full")
            return False
        return True

    def _expire(self, now: float) -> None:
        """Forgets what its window has ended for; what could not be written in all that time is old news."""
        window = int(now // WINDOW_S)
        for key, entry in list(self._entries.items()):
            if entry.window < window and (not entry.untold or now - entry.last_at > WINDOW_S):
                del self._entries[key]
                if entry.untold:
                    self._dropped("late")

    def _fill(self, now: float) -> None:
        if now > self._filled_at:
            self._tokens = min(BURST, self._tokens + (now - self._filled_at) * RATE)
        self._filled_at = now


def _name(pod_name: str, key: Key, window: int) -> str:
    """The same in every replica, so that the second one to say something finds that it has been said."""
    digest = hashlib.sha256("\0".join((*key, str(window))).encode(errors="replace")).hexdigest()
    return f"{pod_name[:200].rstrip('-.')}.{digest[:16]}"
