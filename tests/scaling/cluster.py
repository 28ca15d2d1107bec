"""The nodes: each with the driver's own agenda, pace and formulas, in an event queue of all."""

from __future__ import annotations

import heapq
import math
import random
from dataclasses import dataclass

from csi_driver.core.errors import CertmountError, Reason
from csi_driver.core.renewal import plan_renewal, retry_delay_s
from csi_driver.node.issuance.first_calls import FIRST_SIDE_BY_SIDE, PATIENCE_S
from csi_driver.node.issuance.pace import Pace, spread_s
from csi_driver.node.renewal.agenda import Agenda
from csi_driver.node.renewal.rotation import wait_s
from tests.scaling.authority import Authority

_SILENT = CertmountError(Reason.AUTHORITY_UNAVAILABLE)
_BUSY = CertmountError(Reason.AUTHORITY_OVERLOADED)
_KUBELET_FIRST_S, _KUBELET_CAP_S, _KUBELET_LOOK_S = 0.5, 122.0, 0.1
"""Kubelet tries a failed mount again after half a second, doubling to 2 min 2 s, and looks for what is due ten times a second."""
_TRY, _ARRIVE, _END, _MOUNT, _TRY_FIRST, _FIRST_END, _GIVE_UP = range(7)


@dataclass(slots=True)
class Volume:
    """One certificate. Times in seconds of the story."""

    name: str
    renew_at: float
    not_after: float
    attempt: int = 0
    came: float = 0.0
    """When the kubelet's present call came."""
    mounts: int = 0
    """The kubelet's calls that failed."""


@dataclass(slots=True)
class _Node:
    agenda: Agenda
    pace: Pace
    volumes: dict[str, Volume]
    queue: Agenda
    first_pace: Pace
    next_try: float = math.inf
    next_first: float = math.inf


class Cluster:
    """Nodes with volumes that all have certificates of one life, and one authority."""

    def __init__(self, nodes: int, life_s: float, authority: Authority, seed: int) -> None:
        self.life_s = life_s
        self.authority = authority
        self._rng = random.Random(seed).random  # noqa: S311  # chance that can be repeated
        self.nodes = [
            _Node(Agenda(), Pace(self._rng), {}, Agenda(), Pace(self._rng, FIRST_SIDE_BY_SIDE, FIRST_SIDE_BY_SIDE))
            for _ in range(nodes)
        ]
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
        volume = Volume(name, now, now)
        self.nodes[node].volumes[name] = volume
        self._push(now, _MOUNT, node, volume, 0)

    def plan(self, issued_at: float, late_s: float) -> float:
        """When a certificate is renewed."""
        return plan_renewal(
            issued_at=issued_at,
            not_after=issued_at + self.life_s,
            renew_before_s=None,
            renew_after_s=None,
            jitter=self._rng(),
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
            _MOUNT: self._mount,
            _TRY_FIRST: self._try_first,
            _FIRST_END: self._first_end,
            _GIVE_UP: self._give_up,
        }
        while self._events and self._events[0][0] < end:
            now, _, kind, node, volume, stamp = heapq.heappop(self._events)
            steps[kind](now, node, volume, stamp)

    def _push(self, when: float, kind: int, node: int, volume: Volume | None, stamp: int) -> None:
        self._number += 1
        heapq.heappush(self._events, (when, self._number, kind, node, volume, stamp))

    def _look(self, number: int, now: float) -> None:
        """As csi_driver.node.renewal.rotation.Rotation.run: begins what may begin now, and says when to look again."""
        node = self.nodes[number]
        while True:
            wait = wait_s(node.agenda, node.pace, now, now)
            if wait > 0:
                break
            name = node.agenda.take(now)
            if name is None:
                break
            node.pace.begin()
            self._begin(now, number, node.volumes[name])
        if now + wait < node.next_try:
            node.next_try = now + wait
            self._push(node.next_try, _TRY, number, None, 0)

    def _try(self, now: float, number: int, _volume: Volume | None, _stamp: int) -> None:
        if self.nodes[number].next_try <= now:
            self.nodes[number].next_try = math.inf
            self._look(number, now)

    def _begin(self, now: float, number: int, volume: Volume) -> None:
        stamp = self.nodes[number].pace.stamp
        authority = self.authority
        if authority.away(now):
            self._push(now + authority.figures.patience_s, _END, number, volume, ~stamp)
        elif (arrival := authority.arrival(now, self._rng())) > now:
            self._push(arrival, _ARRIVE, number, volume, stamp)
        else:
            self._arrive(now, number, volume, stamp)

    def _arrive(self, now: float, number: int, volume: Volume | None, stamp: int) -> None:
        assert volume is not None
        end, issued = self.authority.ask(number, now)
        volume.attempt = 0 if issued else volume.attempt + 1
        self._push(end, _END, number, volume, stamp)

    def _end(self, now: float, number: int, volume: Volume | None, stamp: int) -> None:
        """As Renewals and Lanes do with an answer."""
        assert volume is not None
        node = self.nodes[number]
        error = None if volume.attempt == 0 else _BUSY
        if stamp < 0:  # no answer came
            stamp, error = ~stamp, _SILENT
            volume.attempt += 1
        silence = node.pace.heard(stamp, error, now)
        if silence is not None:
            node.agenda.put_off(now, lambda left: spread_s(silence, self._rng, left))
        node.pace.end()
        if error is None:
            self._issued(now, node, volume)
        else:
            delay = retry_delay_s(attempt=volume.attempt, kind=error.reason.kind, jitter=self._rng())
            node.agenda.schedule(volume.name, now + delay, volume.not_after)
        self._look(number, now)

    def _issued(self, now: float, node: _Node, volume: Volume) -> None:
        if volume.renew_at < 0:
            self.caught_up_at = max(self.caught_up_at, now)
        if now > volume.not_after:
            self.expired += 1
            self.expired_after += volume.not_after > 0
        late_s = max(now - volume.renew_at, 0.0)
        volume.renew_at, volume.not_after = self.plan(now, late_s), now + self.life_s
        node.agenda.schedule(volume.name, volume.renew_at, volume.not_after)

    def _mount(self, now: float, number: int, volume: Volume | None, _stamp: int) -> None:
        """As the kubelet calls, and csi_driver.node.issuance.first_calls.FirstCalls.issue begins."""
        assert volume is not None
        volume.came = now
        self.nodes[number].queue.schedule(volume.name, now, now)
        self._push(now + PATIENCE_S, _GIVE_UP, number, volume, 0)
        self._look_first(number, now)

    def _give_up(self, now: float, number: int, volume: Volume | None, _stamp: int) -> None:
        assert volume is not None
        node = self.nodes[number]
        if volume.came + PATIENCE_S <= now and node.queue.due(volume.name) is not None:
            node.queue.cancel(volume.name)
            self._mount_failed(now, number, volume)

    def _look_first(self, number: int, now: float) -> None:
        node = self.nodes[number]
        while True:
            wait = wait_s(node.queue, node.first_pace, now, now)
            if wait > 0:
                break
            name = node.queue.take(now)
            if name is None:
                break
            node.first_pace.begin()
            end, issued = self.authority.ask(number, now)
            volume = node.volumes[name]
            volume.attempt = 0 if issued else volume.attempt + 1
            self._push(end, _FIRST_END, number, volume, node.first_pace.stamp)
        if now + wait < node.next_first:
            node.next_first = now + wait
            self._push(node.next_first, _TRY_FIRST, number, None, 0)

    def _try_first(self, now: float, number: int, _volume: Volume | None, _stamp: int) -> None:
        if self.nodes[number].next_first <= now:
            self.nodes[number].next_first = math.inf
            self._look_first(number, now)

    def _first_end(self, now: float, number: int, volume: Volume | None, stamp: int) -> None:
        """As FirstCalls does with an answer; the pace of the renewals hears of it too."""
        assert volume is not None
        node = self.nodes[number]
        error = None if volume.attempt == 0 else _BUSY
        node.pace.heard(node.pace.stamp, error, now)
        node.first_pace.heard(stamp, error, now)
        node.first_pace.end()
        if error is None:
            self.caught_up_at = max(self.caught_up_at, now)
            volume.renew_at, volume.not_after = self.plan(now, math.inf), now + self.life_s
            node.agenda.schedule(volume.name, volume.renew_at, volume.not_after)
            self._look(number, now)
        elif now < volume.came + PATIENCE_S:
            node.queue.schedule(volume.name, volume.came, volume.came)
        else:
            self._mount_failed(now, number, volume)
        self._look_first(number, now)

    def _mount_failed(self, now: float, number: int, volume: Volume) -> None:
        """As the kubelet does with an error."""
        volume.mounts += 1
        delay = min(_KUBELET_FIRST_S * 2.0 ** min(volume.mounts - 1, 30), _KUBELET_CAP_S)
        self._push(now + delay + self._rng() * _KUBELET_LOOK_S, _MOUNT, number, volume, 0)
