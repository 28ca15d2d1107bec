"""The requests to one issuer that wait or are in progress. Pure: times are arguments, waiting is the caller's."""

from __future__ import annotations

import heapq
import math
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from enum import Enum, unique

from csi_driver.core.errors import CertmountError, Scope
from csi_driver.core.spec import DEFAULT_ISSUER
from csi_driver.node.issuance.rate_controller import RateController

MAX_RENEWALS = 8
"""Concurrent renewals: enough to use an authority fully after an outage, few enough to leave the node to its pods."""
MAX_FIRST_REQUESTS = 16
"""Concurrent first requests to the internal CA. If it takes 20 ms, 100 pods get their certificates in 0.2 s."""
MAX_EXTERNAL_FIRST_REQUESTS = 128  # concurrent first requests to an external issuer, each of which can take a minute


@unique
class RequestClass(Enum):
    """Why a node requests a certificate."""

    FIRST = "the first certificate of a volume; the kubelet waits for it"
    RENEWAL = "a renewal; the volume has a certificate"


@dataclass(eq=False, slots=True)
class QueuedRequest:
    """A request in the queue."""

    request_class: RequestClass
    pod: str  # the UID of the pod
    urgency: float
    """Lower values start first: the expiry time for a renewal, the arrival time for a first request (unix seconds)."""
    volume_id: str = ""
    on_turn: Callable[[float], None] = lambda _postponed_s: None
    """Called once: with 0 when the request starts, or with the seconds by which it is postponed."""
    waiting: bool = True


class _ClassQueue:
    """The requests of one class: round robin over the pods, then by urgency."""

    def __init__(self, controller: RateController) -> None:
        self.controller = controller
        self._heap: list[tuple[int, float, int, QueuedRequest]] = []
        self._requests_of: Counter[str] = Counter()
        self._added = 0

    def add(self, request: QueuedRequest) -> None:
        """Add a request. The n-th request of a pod comes after the (n-1)-th requests of all other pods."""
        self._added += 1
        heapq.heappush(self._heap, (self._requests_of[request.pod], request.urgency, self._added, request))
        self._requests_of[request.pod] += 1

    def wait_s(self, now: float, wall_now: float) -> float:
        """Return the seconds until the next request can start; infinity if none waits or another must end first."""
        while self._heap and not self._heap[0][3].waiting:
            heapq.heappop(self._heap)
        return self.controller.wait_s(now, self._heap[0][1] - wall_now) if self._heap else math.inf

    def start_next(self) -> QueuedRequest:
        request = heapq.heappop(self._heap)[3]
        request.waiting = False
        self.controller.begin()
        return request

    def end(self, request: QueuedRequest) -> None:
        """Remove a request that has ended, or that was cancelled while it waited."""
        if not request.waiting:
            self.controller.end()
        request.waiting = False
        self._requests_of[request.pod] -= 1
        if not self._requests_of[request.pod]:
            del self._requests_of[request.pod]

    def waiting(self) -> list[QueuedRequest]:
        return [request for *_, request in self._heap if request.waiting]

    @property
    def idle(self) -> bool:
        return not self._requests_of


class IssuerQueue:
    """The two classes of requests to one issuer. First requests start before renewals, and never wait for one.

    An outage of the issuer pauses renewals only: a first request fails at once, so that the pod's events show the reason.
    """

    def __init__(self, issuer: str, rng: Callable[[], float]) -> None:
        limit = MAX_FIRST_REQUESTS if issuer == DEFAULT_ISSUER else MAX_EXTERNAL_FIRST_REQUESTS
        self._queues = {
            RequestClass.FIRST: _ClassQueue(RateController(rng, limit, limit)),
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
        """True if no request waits or is in progress, and the issuer has no known outage."""
        return self.outage is None and all(queue.idle for queue in self._queues.values())

    def pause_s(self, now: float, left_s: float) -> float:
        return self._queues[RequestClass.RENEWAL].controller.pause_s(now, left_s)

    def record(self, epochs: tuple[int, ...], error: CertmountError | None, now: float) -> float | None:
        """Record the result of a request that was sent in ``epochs``. Return the outage's seconds if this result ends one."""
        first, renewals = (queue.controller for queue in self._queues.values())
        if error is None or error.reason.kind.scope is not Scope.ISSUER:
            first.record(epochs[0], error, now)
        return renewals.record(epochs[1], error, now)
