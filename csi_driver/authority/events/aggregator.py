"""Decide which pod events are written and when: repeats are counted, and rates are limited. Time is an argument."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass

from csi_driver.core.backoff import Backoff
from csi_driver.core.cluster.objects import PodEvent, RecordedEvent
from csi_driver.core.identity import PodIdentity

WINDOW_S = 600
"""Repeats within a window are counted in one Event. Windows start at full ten minutes, so that all replicas agree on them."""
MAX_EVENTS = 2000
MAX_NEW_PER_POD = 10
"""New events of one pod per minute: the pod's author controls part of their text, so each one can be different."""
RATE, BURST = 20.0, 20.0  # events per second that a replica writes
_REPEATS = Backoff(30, WINDOW_S)
_NEARLY_ONE = 0.999  # of a token: Unix seconds as floats have a resolution of a tenth of a microsecond

EventKey = tuple[str, str, str]


@dataclass(slots=True, eq=False)
class AggregatedEvent:
    """One event, and how much of its count the API server has."""

    event: PodEvent
    window: int
    last_at: float
    due: float
    count: int = 1
    written_count: int = 0
    writes: int = 0
    written: RecordedEvent | None = None

    @property
    def unwritten(self) -> int:
        return self.count - self.written_count


class EventAggregator:
    """The events of the last minutes. ``on_drop`` gets the cause for each event that will not be written."""

    def __init__(self, on_drop: Callable[[str], None]) -> None:
        self._on_drop = on_drop
        self._events: dict[EventKey, AggregatedEvent] = {}
        self._minute = 0
        self._new_by_pod: Counter[str] = Counter()
        self._tokens = BURST
        self._refilled_at = 0.0
        self._paused_until = 0.0

    def __len__(self) -> int:
        return len(self._events)

    def add(self, pod: PodIdentity, *, warning: bool, reason: str, message: str, now: float) -> None:
        """Add an event, or count it if the pod already has it in this window."""
        key, window = (pod.pod_uid, reason, message), int(now // WINDOW_S)
        known = self._events.get(key)
        if known is not None and known.window == window:
            known.count += 1
            known.last_at = now
            return
        if not self._admit(pod.pod_uid, now):
            return
        name, namespace = _event_name(pod.pod_name, key, window), pod.service_account.namespace
        event = PodEvent(name, namespace, pod.pod_name, pod.pod_uid, warning, reason, message, now)
        self._events[key] = AggregatedEvent(event, window, now, now)

    def wait(self, now: float) -> float | None:
        """Return the seconds until the next event can be written; None if there is none."""
        due = min((event.due for event in self._events.values() if event.unwritten), default=None)
        if due is None:
            return None
        self._refill(now)
        until_token = 0.0 if self._tokens >= _NEARLY_ONE else (1 - self._tokens) / RATE
        return max(0.0, due - now, self._paused_until - now, until_token)

    def take(self, now: float) -> AggregatedEvent | None:
        """Return the next event to write now and count it against the rate. Without :meth:`complete` it stays due."""
        self._expire(now)
        if self.wait(now) != 0.0:
            return None
        self._tokens -= 1
        return min((event for event in self._events.values() if event.unwritten), key=lambda event: event.due)

    def complete(self, event: AggregatedEvent, written_count: int, written: RecordedEvent, now: float) -> None:
        """Store what the API server has; each later update of the count waits longer."""
        event.writes += 1
        event.written, event.written_count = written, written_count
        event.due = now + _REPEATS.delay_s(event.writes)

    def drop(self, event: AggregatedEvent, cause: str) -> None:
        event.written_count = event.count = 0
        event.due = float("inf")
        self._on_drop(cause)

    def pause(self, seconds: float, now: float) -> None:
        self._paused_until = now + seconds

    def _admit(self, pod_uid: str, now: float) -> bool:
        if self._minute != int(now // 60):
            self._minute = int(now // 60)
            self._new_by_pod.clear()
        self._new_by_pod[pod_uid] += 1
        if self._new_by_pod[pod_uid] > MAX_NEW_PER_POD:
            self._on_drop("pod")
            return False
        if len(self._events) >= MAX_EVENTS:
            self._expire(now)
        if full := len(self._events) >= MAX_EVENTS:
            self._on_drop("full")
        return not full

    def _expire(self, now: float) -> None:
        """Remove the events of past windows; an event that could not be written within another window is dropped."""
        window = int(now // WINDOW_S)
        for key, event in list(self._events.items()):
            if event.window < window and (not event.unwritten or now - event.last_at > WINDOW_S):
                del self._events[key]
                if event.unwritten:
                    self._on_drop("late")

    def _refill(self, now: float) -> None:
        if now > self._refilled_at:
            self._tokens = min(BURST, self._tokens + (now - self._refilled_at) * RATE)
        self._refilled_at = now


def _event_name(pod_name: str, key: EventKey, window: int) -> str:
    """Return a name that all replicas derive alike, so that the second replica counts the event of the first."""
    digest = hashlib.sha256("\0".join((*key, str(window))).encode(errors="replace")).hexdigest()
    return f"{pod_name[:200].rstrip('-.')}.{digest[:16]}"
