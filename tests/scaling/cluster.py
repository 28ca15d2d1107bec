"""The nodes: each with the driver's own agenda, pace and formulas, in an event queue of all."""

from __future__ import annotations

import heapq
import math
import random
from dataclasses import dataclass

from csi_driver.core.errors import CertmountError, Kind, Reason
from csi_driver.core.renewal import plan_renewal, retry_delay_s
from csi_driver.node.agenda import Agenda
from csi_driver.node.pace import Pace, spread_s
from tests.scaling.authority import Authority

_SILENT = CertmountError(Reason.AUTHORITY_UNAVAILABLE)
_BUSY = CertmountError(Reason.OVERLOADED)
_KUBELET_FIRST_S, _KUBELET_CAP_S, _KUBELET_LOOK_S = 0.5, 122.0, 0.1
"""Kubelet tries a failed mount again after half a second, doubling to 2 min 2 s, and looks for what is due ten times a second."""
_TRY, _ARRIVE, _END, _FIRST, _FIRST_END = range(5)


@dataclass(slots=True)
class Volume:
    """One certificate. Times in seconds of the story."""

    name: str
    renew_at: float
    not_after: float
    attempt: int = 0
    waited_since: float = math.nan
    """For a first publish: since when the pod waits."""


@dataclass(slots=True)
class _Node:
    agenda: Agenda
    pace: Pace
    volumes: dict[str, Volume]
    next_try: float = math.inf


class Cluster:
    """Nodes with volumes that all have certificates of one life, and one authority."""

    def __init__(self, nodes: int, life_s: float, authority: Authority, seed: int) -> None:
        self.life_s = life_s
        self.authority = authority
        self.random = random.Random(seed)
        self._chance = self.random.random
        self.nodes = [_Node(Agenda(), Pace(self._chance), {}) for _ in range(nodes)]
        self._events: list[tuple[float, int, int, int, Volume | None, int]] = []
        self._number = 0
        self.caught_up_at = -math.inf
        """When the last certificate came that was due before the authority was back, or a pod that waited got its first."""
        self.expired = 0
        """Certificates that ended before their successors came."""
        self.expired_after = 0
        """Of these, those that were still good at second 0."""

    # Before the story.

    def add(self, node: int, name: str, issued_at: float, renew_at: float) -> None:
        """A volume that has its certificate."""
        volume = Volume(name, renew_at, issued_at + self.life_s)
        self.nodes[node].volumes[name] = volume
        self.nodes[node].agenda.schedule(name, renew_at, volume.not_after)

    def silence(self, node: int, until: float) -> None:
        """The node has had no answer since its first volume was due, and its pace heard so at each of its tries."""
        pace, volumes = self.nodes[node].pace, self.nodes[node].volumes.values()
        now, ends = min(((volume.renew_at, volume.not_after) for volume in volumes), default=(math.inf, math.inf))
        while now < until:
            pace.heard(pace.stamp, _SILENT, now)
            now += pace.pause_s(now, ends - now) + self.authority.figures.patience_s

    def first(self, node: int, name: str, now: float) -> None:
        """The kubelet mounts a new pod's volume."""
        volume = Volume(name, now, now, waited_since=now)
        self.nodes[node].volumes[name] = volume
        self._push(now, _FIRST, node, volume, 0)

    def plan(self, issued_at: float, late_s: float) -> float:
        """When a certificate is renewed."""
        return plan_renewal(
            issued_at=issued_at,
            not_after=issued_at + self.life_s,
            renew_before_s=None,
            renew_after_s=None,
            chance=self._chance(),
            late_s=late_s,
        )

    # The story.

    def run(self, start: float, end: float) -> None:
        """Lets time pass."""
        for number in range(len(self.nodes)):
            self._look(number, start)
        steps = {
            _TRY: self._try,
            _ARRIVE: self._arrive,
            _END: self._end,
            _FIRST: self._first,
            _FIRST_END: self._first_end,
        }
        while self._events and self._events[0][0] < end:
            now, _, kind, node, volume, stamp = heapq.heappop(self._events)
            steps[kind](now, node, volume, stamp)

    def _push(self, when: float, kind: int, node: int, volume: Volume | None, stamp: int) -> None:
        self._number += 1
        heapq.heappush(self._events, (when, self._number, kind, node, volume, stamp))

    def _look(self, number: int, now: float) -> None:
        """As csi_driver.node.rotation.Rotation.run: begins what may begin now, and says when to look again."""
        node = self.nodes[number]
        while True:
            wait = max(node.agenda.wait_s(now), node.pace.wait_s(now, node.agenda.left_s(now)))
            if wait > 0:
                break
            name = node.agenda.take(now)
            if name is None:
                break
            node.pace.begin()
            self._begin(now, number, node.volumes[name], _ARRIVE)
        if now + wait < node.next_try:
            node.next_try = now + wait
            self._push(node.next_try, _TRY, number, None, 0)

    def _try(self, now: float, number: int, _volume: Volume | None, _stamp: int) -> None:
        if self.nodes[number].next_try <= now:
            self.nodes[number].next_try = math.inf
            self._look(number, now)

    def _begin(self, now: float, number: int, volume: Volume, kind: int) -> None:
        stamp = self.nodes[number].pace.stamp
        authority = self.authority
        if authority.away(now):
            end = _END if kind == _ARRIVE else _FIRST_END
            self._push(now + authority.figures.patience_s, end, number, volume, ~stamp)
        elif (arrival := authority.arrival(now, self._chance())) > now:
            self._push(arrival, kind, number, volume, stamp)
        else:
            self._answer(now, number, volume, stamp, _END if kind == _ARRIVE else _FIRST_END)

    def _answer(self, now: float, number: int, volume: Volume, stamp: int, kind: int) -> None:
        end, issued = self.authority.ask(number, now)
        volume.attempt = 0 if issued else volume.attempt + 1
        self._push(end, kind, number, volume, stamp)

    def _arrive(self, now: float, number: int, volume: Volume | None, stamp: int) -> None:
        assert volume is not None
        self._answer(now, number, volume, stamp, _END)

    def _end(self, now: float, number: int, volume: Volume | None, stamp: int) -> None:
        """As Renewals and Lanes do with an answer."""
        assert volume is not None
        node = self.nodes[number]
        error, silence = self._hear(now, node, volume, stamp)
        if silence is not None:
            node.agenda.put_off(now, lambda left: spread_s(silence, self._chance, left))
        node.pace.end()
        if error is None:
            self._issued(now, node, volume)
        else:
            delay = retry_delay_s(attempt=volume.attempt, kind=error.reason.kind, chance=self._chance())
            node.agenda.schedule(volume.name, now + delay, volume.not_after)
        self._look(number, now)

    def _hear(self, now: float, node: _Node, volume: Volume, stamp: int) -> tuple[CertmountError | None, float | None]:
        """How a call ended, as its stamp (a complement: without an answer) and attempt tell; and the silence that this ends."""
        error = None if volume.attempt == 0 else _BUSY
        if stamp < 0:
            stamp, error = ~stamp, _SILENT
            volume.attempt += 1
        return error, node.pace.heard(stamp, error, now)

    def _issued(self, now: float, node: _Node, volume: Volume) -> None:
        if volume.renew_at < 0:
            self.caught_up_at = max(self.caught_up_at, now)
        if now > volume.not_after:
            self.expired += 1
            self.expired_after += volume.not_after > 0
        late_s = max(now - volume.renew_at, 0.0)
        volume.renew_at, volume.not_after = self.plan(now, late_s), now + self.life_s
        node.agenda.schedule(volume.name, volume.renew_at, volume.not_after)

    def _first(self, now: float, number: int, volume: Volume | None, _stamp: int) -> None:
        assert volume is not None
        self._begin(now, number, volume, _FIRST)

    def _first_end(self, now: float, number: int, volume: Volume | None, stamp: int) -> None:
        """As the kubelet does with an answer; the node's pace hears of it too."""
        assert volume is not None
        node = self.nodes[number]
        error, _ = self._hear(now, node, volume, stamp)
        if error is not None:
            delay = min(_KUBELET_FIRST_S * 2.0 ** min(volume.attempt - 1, 30), _KUBELET_CAP_S)
            self._push(now + delay + self._chance() * _KUBELET_LOOK_S, _FIRST, number, volume, 0)
            return
        self.caught_up_at = max(self.caught_up_at, now)
        volume.renew_at, volume.not_after = self.plan(now, math.inf), now + self.life_s
        node.agenda.schedule(volume.name, volume.renew_at, volume.not_after)
        self._look(number, now)
