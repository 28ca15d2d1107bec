"""Simulated nodes with the driver's own due times, request queues and formulas, and one event queue for all of them."""

from __future__ import annotations

import heapq
import math
import random
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from csi_driver.core.backoff import Backoff
from csi_driver.core.due_times import DueTimes
from csi_driver.core.errors import CertmountError, Reason
from csi_driver.core.renewal import catch_up_delay_s, plan_renewal, retry_delay_s
from csi_driver.core.spec import DEFAULT_ISSUER
from csi_driver.node.issuance.issuer_queue import IssuerQueue, QueuedRequest, RequestClass
from csi_driver.node.issuance.request_queue import MAX_WAIT_S
from csi_driver.node.pods import Pod
from tests.scaling.authority import Authority

_UNAVAILABLE = CertmountError(Reason.AUTHORITY_UNAVAILABLE)
_OVERLOADED = CertmountError(Reason.AUTHORITY_OVERLOADED)
_KUBELET = Backoff(0.5, 122.0)
_KUBELET_SYNC_S = 0.1
"""The kubelet retries a failed mount with this backoff, and checks ten times a second for mounts that are due."""


@dataclass(slots=True)
class Volume:
    """One certificate. Times are in seconds of the simulation."""

    name: str
    renew_at: float
    not_after: float
    failures: int = 0
    mount_started_at: float = 0.0
    mount_failures: int = 0


@dataclass(slots=True)
class Node:
    """One node with its volumes by name."""

    number: int
    queue: IssuerQueue
    due: DueTimes = field(default_factory=DueTimes)
    volumes: dict[str, Volume] = field(default_factory=dict)
    next_update: float = math.inf


class Cluster:
    """Nodes whose certificates all have the same lifetime, and one authority."""

    def __init__(self, nodes: int, lifetime_s: float, authority: Authority, seed: int) -> None:
        self.lifetime_s = lifetime_s
        self.authority = authority
        self._rng = random.Random(seed).random  # noqa: S311  # The simulation must be repeatable.
        self.nodes = [Node(number, IssuerQueue(DEFAULT_ISSUER, self._rng)) for number in range(nodes)]
        self._events: list[tuple[float, int, Callable[..., None], tuple[Any, ...]]] = []
        self._events_added = 0
        self.caught_up_at = -math.inf
        """The time of the last certificate that was due before second 0, or that a new pod waited for."""
        self.expired = 0  # certificates that expired before their renewal
        self.expired_after = 0  # those that were still valid at second 0

    # Before the simulation.

    def add(self, node: Node, name: str, issued_at: float, renew_at: float) -> None:
        node.volumes[name] = Volume(name, renew_at, issued_at + self.lifetime_s)
        node.due.schedule(name, renew_at)

    def simulate_outage(self, node: Node, until: float) -> None:
        """Record failed probes of a node from its first due time on."""
        volumes = node.volumes.values()
        now, expiry = min(((volume.renew_at, volume.not_after) for volume in volumes), default=(math.inf, math.inf))
        while now < until:
            node.queue.record(node.queue.epochs, _UNAVAILABLE, now)
            now += node.queue.pause_s(now, expiry - now) + self.authority.figures.unavailable_timeout_s

    def add_new_pod(self, node: Node, name: str, now: float) -> None:
        """Add a volume that the kubelet mounts for a new pod."""
        node.volumes[name] = Volume(name, now, now)
        self._at(now, self._mount, node, node.volumes[name])

    def plan(self, issued_at: float, late_s: float) -> float:
        return plan_renewal(
            issued_at=issued_at,
            not_after=issued_at + self.lifetime_s,
            renew_before=None,
            renew_after_s=None,
            jitter=self._rng(),
            late_s=late_s,
        )

    # The simulation.

    def run(self, start: float, end: float) -> None:
        for node in self.nodes:
            self._update(start, node)
        while self._events and self._events[0][0] < end:
            now, _, action, arguments = heapq.heappop(self._events)
            action(now, *arguments)

    def _at(self, when: float, action: Callable[..., None], *arguments: Any) -> None:
        self._events_added += 1
        heapq.heappush(self._events, (when, self._events_added, action, arguments))

    def _update(self, now: float, node: Node) -> None:
        """Queue the renewals that are due, and start the requests that may start (as Scheduler and RequestQueue do)."""
        while (name := node.due.take(now)) is not None:
            self._enqueue(node, RequestClass.RENEWAL, name, node.volumes[name].not_after)
        while (request := node.queue.start_next(now, now)) is not None:
            self._send(now, node, request)
        next_update = now + min(node.due.wait_s(now), node.queue.wait_s(now, now))
        if next_update < node.next_update:
            node.next_update = next_update
            self._at(next_update, self._update_if_due, node)

    def _update_if_due(self, now: float, node: Node) -> None:
        if node.next_update <= now:
            node.next_update = math.inf
            self._update(now, node)

    @staticmethod
    def _enqueue(node: Node, request_class: RequestClass, name: str, urgency: float) -> QueuedRequest:
        request = QueuedRequest(request_class, Pod(name, name, name, name), urgency, name)
        node.queue.add(request)
        return request

    def _send(self, now: float, node: Node, request: QueuedRequest) -> None:
        epochs = node.queue.epochs
        if self.authority.is_unavailable(now):
            end = now + self.authority.figures.unavailable_timeout_s
            self._at(end, self._end, node, request, epochs, _UNAVAILABLE)
        else:
            self._at(self.authority.arrival(now, self._rng()), self._arrive, node, request, epochs)

    def _arrive(self, now: float, node: Node, request: QueuedRequest, epochs: tuple[int, ...]) -> None:
        end, issued = self.authority.call(node.number, now)
        self._at(end, self._end, node, request, epochs, None if issued else _OVERLOADED)

    def _end(
        self, now: float, node: Node, request: QueuedRequest, epochs: tuple[int, ...], error: CertmountError | None
    ) -> None:
        volume = node.volumes[request.volume_id]
        outage_s = node.queue.record(epochs, error, now)
        if outage_s is not None:
            self._postpone_renewals(now, node, outage_s)
        node.queue.end(request)
        if error is None:
            self._issued(now, node, volume, math.inf if request.request_class is RequestClass.FIRST else None)
        elif request.request_class is RequestClass.FIRST:
            self._retry_first_request(now, node, volume)
        else:
            volume.failures += 1
            delay_s = retry_delay_s(attempt=volume.failures, kind=error.reason.kind, jitter=self._rng())
            node.due.schedule(volume.name, now + delay_s)
        self._update(now, node)

    def _postpone_renewals(self, now: float, node: Node, outage_s: float) -> None:
        for request in node.queue.waiting(RequestClass.RENEWAL):
            delay_s = catch_up_delay_s(outage_s=outage_s, left_s=request.urgency - now, jitter=self._rng())
            if delay_s > 0:
                node.queue.end(request)
                node.due.schedule(request.volume_id, now + delay_s)

    def _issued(self, now: float, node: Node, volume: Volume, late_s: float | None) -> None:
        if late_s is not None or volume.renew_at < 0:
            self.caught_up_at = max(self.caught_up_at, now)
        if late_s is None and now > volume.not_after:
            self.expired += 1
            self.expired_after += volume.not_after > 0
        late_s = max(now - volume.renew_at, 0.0) if late_s is None else late_s
        volume.failures = 0
        volume.renew_at, volume.not_after = self.plan(now, late_s), now + self.lifetime_s
        node.due.schedule(volume.name, volume.renew_at)

    def _mount(self, now: float, node: Node, volume: Volume) -> None:
        """The kubelet calls NodePublishVolume (see RequestQueue.issue_first)."""
        volume.mount_started_at = now
        request = self._enqueue(node, RequestClass.FIRST, volume.name, now)
        self._at(now + MAX_WAIT_S, self._time_out, node, request)
        self._update(now, node)

    def _time_out(self, now: float, node: Node, request: QueuedRequest) -> None:
        if request.waiting:
            node.queue.end(request)
            self._mount_failed(now, node, node.volumes[request.volume_id])

    def _retry_first_request(self, now: float, node: Node, volume: Volume) -> None:
        deadline = volume.mount_started_at + MAX_WAIT_S
        if now < deadline:
            request = self._enqueue(node, RequestClass.FIRST, volume.name, volume.mount_started_at)
            self._at(deadline, self._time_out, node, request)
        else:
            self._mount_failed(now, node, volume)

    def _mount_failed(self, now: float, node: Node, volume: Volume) -> None:
        volume.mount_failures += 1
        delay_s = _KUBELET.delay_s(volume.mount_failures) + self._rng() * _KUBELET_SYNC_S
        self._at(now + delay_s, self._mount, node, volume)
