"""The requests to one issuer that wait or are in progress. Pure: times are arguments, waiting is the caller's."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from enum import Enum, unique

from csi_driver.core.errors import CertmountError, Scope
from csi_driver.core.shares import FairShares
from csi_driver.core.spec import DEFAULT_ISSUER
from csi_driver.node.fair_queue import FairQueue
from csi_driver.node.issuance.rate_controller import RateController
from csi_driver.node.pods import Pod

MAX_RENEWALS = 8
"""Concurrent renewals: enough to use an authority fully after an outage, few enough to leave the node to its pods."""
MAX_FIRST_REQUESTS = 32
"""Concurrent first requests to the internal CA. A single namespace gets half of them: if the CA takes 20 ms, 100 pods get
their certificates in 0.2 s."""
MAX_EXTERNAL_FIRST_REQUESTS = 256
"""Concurrent first requests to an external issuer, each of which can take a minute. A single namespace gets half of them."""


@unique
class RequestClass(Enum):
    """Why a node requests a certificate."""

    FIRST = "the first certificate of a volume; the kubelet waits for it"
    RENEWAL = "a renewal; the volume has a certificate"


@dataclass(eq=False, slots=True)
class QueuedRequest:
    """A request in the queue."""

    request_class: RequestClass
    pod: Pod
    urgency: float
    """Lower values start first: the expiry time for a renewal, the arrival time for a first request (unix seconds)."""
    volume_id: str = ""
    on_turn: Callable[[float], None] = lambda _postponed_s: None
    """Called once: with 0 when the request starts, or with the seconds by which it is postponed."""
    waiting: bool = True


class _ClassQueue:
    """The requests of one class, in the order of :class:`FairQueue`."""

    def __init__(self, controller: RateController, shares: FairShares | None = None) -> None:
        self.controller = controller
        self._shares = shares
        self._queue: FairQueue[QueuedRequest] = FairQueue()

    def add(self, request: QueuedRequest) -> None:
        self._queue.add(request)

    def wait_s(self, now: float, wall_now: float) -> float:
        """Return the seconds until the next request can start; infinity if none waits or another must end first."""
        request = self._queue.next()
        # The namespace of the next request has the fewest in progress. If its share is used up, so are all others.
        if request is None or (self._shares is not None and not self._shares.fits(request.pod.tenant)):
            return math.inf
        return self.controller.wait_s(now, request.urgency - wall_now)

    def start_next(self) -> QueuedRequest:
        request = self._queue.start_next()
        request.waiting = False
        self.controller.begin()
        if self._shares is not None:
            self._shares.take(request.pod.tenant)
        return request

    def end(self, request: QueuedRequest) -> None:
        """Remove a request that has ended, or that was cancelled while it waited."""
        self._queue.end(request, started=not request.waiting)
        if not request.waiting:
            self.controller.end()
            if self._shares is not None:
                self._shares.give_back(request.pod.tenant)
        request.waiting = False

    def waiting(self) -> list[QueuedRequest]:
        return self._queue.waiting()

    @property
    def idle(self) -> bool:
        return not len(self._queue)


class IssuerQueue:
    """The two classes of requests to one issuer. First requests start before renewals, and never wait for one.

    An outage of the issuer pauses renewals only: a first request fails at once, so that the pod's events show the reason.
    """

    def __init__(self, issuer: str, rng: Callable[[], float]) -> None:
        limit = MAX_FIRST_REQUESTS if issuer == DEFAULT_ISSUER else MAX_EXTERNAL_FIRST_REQUESTS
        shares = FairShares("first requests", limit + 1)  # many namespaces together use all but one
        self._queues = {
            RequestClass.FIRST: _ClassQueue(RateController(rng, limit, limit), shares),
            RequestClass.RENEWAL: _ClassQueue(RateController(rng, MAX_RENEWALS)),
        }

    def add(self, request: QueuedRequest) -> None:
        self._queues[request.request_class].add(request)

    def end(self, request: QueuedRequest) -> None:
        """Remove a request that has ended, or that was cancelled while it waited."""
        self._queues[request.request_class].end(request)

    def start_next(self, now: float, wall_now: float) -> QueuedRequest | None:
        for queue in self._queues.values():
            if queue.wait_s(now, wall_now) <= 0:
                return queue.start_next()
        return None

    def wait_s(self, now: float, wall_now: float) -> float:
        """Return the seconds until a request can start; infinity if none waits or another must end first."""
        return min(queue.wait_s(now, wall_now) for queue in self._queues.values())

    def waiting(self, request_class: RequestClass) -> list[QueuedRequest]:
        return self._queues[request_class].waiting()

    @property
    def epochs(self) -> tuple[int, ...]:
        """What :meth:`record` must be given for a request that starts now."""
        return tuple(queue.controller.epoch for queue in self._queues.values())

    @property
    def outage(self) -> CertmountError | None:
        """The failure that every request to the issuer would have now, or None."""
        return self._queues[RequestClass.RENEWAL].controller.outage

    @property
    def idle(self) -> bool:
        """True if no request waits or is in progress."""
        return all(queue.idle for queue in self._queues.values())

    def pause_s(self, now: float, left_s: float) -> float:
        return self._queues[RequestClass.RENEWAL].controller.pause_s(now, left_s)

    def record(self, epochs: tuple[int, ...], error: CertmountError | None, now: float) -> float | None:
        """Record the result of a request that was sent in ``epochs``. Return the outage's seconds if this result ends one."""
        first, renewals = (queue.controller for queue in self._queues.values())
        if error is None or error.reason.kind.scope is not Scope.ISSUER:
            first.record(epochs[0], error, now)
        return renewals.record(epochs[1], error, now)
