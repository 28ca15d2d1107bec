"""Decide which events are written and when: repeats are counted, and rates are limited. Time is an argument."""

from __future__ import annotations

import hashlib
import heapq
import itertools
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass

from csi_driver.core.backoff import Backoff
from csi_driver.core.cluster.objects import ClusterEvent, EventTarget, RecordedEvent
from csi_driver.core.shares import FairShares

WINDOW_S = 600
"""Repeats within a window are counted in one Event. Windows start at full ten minutes, so that all replicas agree on them."""
MAX_EVENTS = 2000
MAX_NEW_PER_OBJECT = 10
"""New events of one object per minute: its author controls part of their text, so each one can be different."""
RATE, BURST = 20.0, 20.0  # events per second that a replica writes; namespaces take turns
_REPEATS = Backoff(30, WINDOW_S)
_NEARLY_ONE = 0.999  # of a token: clocks have a limited resolution

EventKey = tuple[str, str, str]


@dataclass(slots=True, eq=False)
class AggregatedEvent:
    """One event, and how much of its count the API server has. Times are monotonic, except ``last_at`` (Unix seconds)."""

    event: ClusterEvent
    owners: tuple[str, ...]
    window: int
    last_at: float
    seen: float
    due: float
    count: int = 1
    written_count: int = 0
    writes: int = 0
    written: RecordedEvent | None = None
    queued: bool = False  # also while it is being written

    @property
    def key(self) -> EventKey:
        return self.event.target.uid, self.event.reason, self.event.message

    @property
    def unwritten(self) -> int:
        return self.count - self.written_count


class EventAggregator:
    """The events of the last minutes. ``on_drop`` gets the cause for each event that will not be written.

    ``now`` is monotonic time in seconds, ``at`` is Unix time.
    """

    def __init__(self, on_drop: Callable[[str], None]) -> None:
        self._on_drop = on_drop
        self._events: dict[EventKey, AggregatedEvent] = {}
        self._shares = FairShares("events", MAX_EVENTS)
        self._number = itertools.count()  # makes the entries of the heaps comparable
        self._waiting: list[tuple[float, int, AggregatedEvent]] = []  # heap by due time
        self._ready: dict[str, dict[AggregatedEvent, None]] = {}  # by namespace, the next one first
        self._expiry: list[tuple[float, int, AggregatedEvent]] = []  # heap by the time to forget the event
        self._minute = 0
        self._new_by_object: Counter[str] = Counter()
        self._tokens = BURST
        self._refilled_at = 0.0
        self._paused_until = 0.0

    def __len__(self) -> int:
        return len(self._events)

    def add(
        self,
        target: EventTarget,
        owners: tuple[str, ...],
        *,
        warning: bool,
        reason: str,
        message: str,
        now: float,
        at: float,
    ) -> None:
        """Add an event, or count it if the object already has it in this window."""
        key, window = (target.uid, reason, message), int(at // WINDOW_S)
        self._expire(now)
        known = self._events.get(key)
        if known is not None and known.window == window:
            known.count += 1
            known.last_at, known.seen = at, now
            self._schedule(known)
            return
        if known is not None:
            self._forget(known)
        if not self._admit(target.uid, owners, now):
            return
        event = ClusterEvent(_event_name(target.name, key, window), target, warning, reason, message, at)
        added = self._events[key] = AggregatedEvent(event, owners, window, at, now, now)
        heapq.heappush(self._expiry, (now + WINDOW_S - at % WINDOW_S, next(self._number), added))
        self._schedule(added)

    def wait(self, now: float) -> float | None:
        """Return the seconds until the next event can be written; None if there is none."""
        self._collect_ready(now)
        if not self._ready and not self._waiting:
            return None
        due = now if self._ready else self._waiting[0][0]
        self._refill(now)
        until_token = 0.0 if self._tokens >= _NEARLY_ONE else (1 - self._tokens) / RATE
        return max(0.0, due - now, self._paused_until - now, until_token)

    def take(self, now: float) -> AggregatedEvent | None:
        """Return the next event to write now and count it against the rate; then call complete, drop or postpone."""
        self._expire(now)
        if self.wait(now) != 0.0:
            return None
        self._tokens -= 1
        namespace, ready = next(iter(self._ready.items()))
        event = next(iter(ready))
        del ready[event], self._ready[namespace]
        if ready:
            self._ready[namespace] = ready  # behind the other namespaces
        return event

    def complete(self, event: AggregatedEvent, written_count: int, written: RecordedEvent, now: float) -> None:
        """Store what the API server has; each later update of the count waits longer."""
        event.writes += 1
        event.written, event.written_count = written, written_count
        event.due = now + _REPEATS.delay_s(event.writes)
        event.queued = False
        if event.unwritten > 0:
            self._schedule(event)

    def drop(self, event: AggregatedEvent, cause: str) -> None:
        """Do not write the event and its repeats."""
        event.written_count = event.count
        event.due = float("inf")
        ready = self._ready.get(event.event.namespace, {})
        if event in ready:
            del ready[event]
            if not ready:
                del self._ready[event.event.namespace]
        self._on_drop(cause)

    def postpone(self, event: AggregatedEvent, seconds: float, now: float) -> None:
        """Write this event again, and no event before that time."""
        self._paused_until = now + seconds
        event.queued = False
        self._schedule(event)

    def _schedule(self, event: AggregatedEvent) -> None:
        if not event.queued and event.due != float("inf"):
            event.queued = True
            heapq.heappush(self._waiting, (event.due, next(self._number), event))

    def _collect_ready(self, now: float) -> None:
        while self._waiting and self._waiting[0][0] <= now:
            event = heapq.heappop(self._waiting)[2]
            if event.unwritten > 0:
                self._ready.setdefault(event.event.namespace, {})[event] = None

    def _admit(self, uid: str, owners: tuple[str, ...], now: float) -> bool:
        if self._minute != int(now // 60):
            self._minute = int(now // 60)
            self._new_by_object.clear()
        self._new_by_object[uid] += 1
        if self._new_by_object[uid] > MAX_NEW_PER_OBJECT:
            self._on_drop("object")
        elif self._shares.try_take(owners):
            return True
        else:  # an event about it would be the next one that is too many
            self._on_drop("share")
        return False

    def _expire(self, now: float) -> None:
        """Remove the events of past windows; an event that could not be written within another window is dropped."""
        while self._expiry and self._expiry[0][0] <= now:
            event = heapq.heappop(self._expiry)[2]
            if event.unwritten > 0 and now < event.seen + WINDOW_S:
                heapq.heappush(self._expiry, (event.seen + WINDOW_S, next(self._number), event))
                continue
            if self._events.get(event.key) is event:  # otherwise, the same event of the next window replaced it
                self._forget(event)
            if event.unwritten > 0:
                self.drop(event, "late")

    def _forget(self, event: AggregatedEvent) -> None:
        del self._events[event.key]
        self._shares.give_back(event.owners)

    def _refill(self, now: float) -> None:
        if now > self._refilled_at:
            self._tokens = min(BURST, self._tokens + (now - self._refilled_at) * RATE)
        self._refilled_at = now


def _event_name(target: str, key: EventKey, window: int) -> str:
    """Return a name that all replicas derive alike, so that the second replica counts the event of the first."""
    digest = hashlib.sha256("\0".join((*key, str(window))).encode(errors="replace")).hexdigest()
    return f"{target[:200].rstrip('-.')}.{digest[:16]}"
