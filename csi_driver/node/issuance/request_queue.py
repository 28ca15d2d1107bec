"""The queue of all issuance requests that this node sends to the authority."""

from __future__ import annotations

import asyncio
import itertools
import math
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from functools import partial
from typing import Protocol, TypeVar

import structlog

from csi_driver.core.attributes import CertificateSpec
from csi_driver.core.errors import CertmountError, Reason, Scope
from csi_driver.core.renewal import catch_up_delay_s, retry_delay_s
from csi_driver.core.secret import Secret
from csi_driver.core.spec import DEFAULT_ISSUER
from csi_driver.node.issuance.issuer_queue import IssuerQueue, QueuedRequest, RequestClass
from csi_driver.node.pods import Pod
from csi_driver.rpc.authority_messages import IssuanceResponse

log = structlog.get_logger(__name__)

MAX_WAIT_S = 60.0
"""The longest wait of a first request: half of the kubelet's timeout, so that the pod's events show the reason."""
_MAX_ISSUERS = 100
"""Issuers with a queue. Pods can name any issuer, so the queues of unused issuers are removed beyond this number."""
_LONGEST_SLEEP_S = 60.0  # the length of a pause depends on the wall clock, which can change

T = TypeVar("T")


class AuthorityCalls(Protocol):
    """The calls of :class:`csi_driver.node.authority_client.AuthorityClient` that a rate controller limits."""

    async def issue(self, csr: bytes, token: Secret[str], spec: CertificateSpec, /) -> IssuanceResponse: ...

    async def check(self, csr: bytes, token: Secret[str], spec: CertificateSpec, /) -> None: ...


class RequestQueue:
    """Sends issuance requests to the authority.

    Each issuer has its own queue, so no request waits for another issuer. See :class:`IssuerQueue` for the order.
    """

    def __init__(self, calls: AuthorityCalls, clock: Callable[[], float], rng: Callable[[], float]) -> None:
        self._calls = calls
        self._clock = clock
        self._rng = rng
        self._queues: dict[str, IssuerQueue] = {}
        self._timers: dict[str, asyncio.TimerHandle] = {}

    async def issue_first(self, csr: bytes, token: Secret[str], spec: CertificateSpec, pod: Pod) -> IssuanceResponse:
        """Send the first request of a volume when its turn comes, and retry for 60 s if a limit is reached.

        The limit can be the authority's or a share of the pod's owners. Between retries the request holds no place that
        others could use.

        Raises CertmountError: the authority's reason, or AuthorityOverloaded if the request waited too long.
        """
        return await self._send_first(spec.issuer, pod, lambda: self._calls.issue(csr, token, spec))

    async def check_first(self, csr: bytes, token: Secret[str], spec: CertificateSpec, pod: Pod) -> None:
        """Ask the authority whether it would issue a certificate; otherwise as :meth:`issue_first`.

        The authority does not call an issuer for it. So it waits only for requests to the internal CA, which are short.
        """
        await self._send_first(DEFAULT_ISSUER, pod, lambda: self._calls.check(csr, token, spec), spec.issuer)

    async def check(self, csr: bytes, token: Secret[str], spec: CertificateSpec) -> None:
        """Do what :meth:`check_first` does for a renewal whose turn has come."""
        await self._send(DEFAULT_ISSUER, lambda: self._calls.check(csr, token, spec), spec.issuer)

    def renewal_turn(
        self, issuer: str, pod: Pod, volume_id: str, not_after: float
    ) -> AbstractAsyncContextManager[float]:
        """Wait until a renewal may start, and hold its place while it runs.

        The context value is 0 if the renewal may start now. If an outage has just ended, it is the number of seconds by
        which the renewal must be postponed. It is infinity if the renewal was cancelled.
        """
        return self._turn(issuer, QueuedRequest(RequestClass.RENEWAL, pod, not_after, volume_id))

    def cancel_renewal(self, volume_id: str) -> None:
        for queue in self._queues.values():
            for request in queue.waiting(RequestClass.RENEWAL):
                if request.volume_id == volume_id:
                    request.on_turn(math.inf)

    async def issue(self, csr: bytes, token: Secret[str], spec: CertificateSpec) -> IssuanceResponse:
        """Send a request whose turn has come, and record the result for the rate controllers."""
        return await self._send(spec.issuer, lambda: self._calls.issue(csr, token, spec))

    def outage(self, issuer: str) -> CertmountError | None:
        return self._queues[issuer].outage if issuer in self._queues else None

    def pause_s(self, issuer: str, not_after: float) -> float:
        """Return the seconds until the next renewal with an issuer can start if none is in progress."""
        return self._queues[issuer].pause_s(_now(), not_after - self._clock()) if issuer in self._queues else 0.0

    def renewals_waiting(self) -> int:
        """Return the number of renewals that wait for their turn. Also called from other threads."""
        return sum(len(queue.waiting(RequestClass.RENEWAL)) for queue in list(self._queues.values()))

    async def _send_first(
        self, issuer: str, pod: Pod, call: Callable[[], Awaitable[T]], checked: str | None = None
    ) -> T:
        deadline, request = _now() + MAX_WAIT_S, partial(QueuedRequest, RequestClass.FIRST, pod, self._clock())
        for attempt in itertools.count(1):
            try:
                async with self._turn(issuer, request(), deadline):
                    return await self._send(issuer, call, checked)
            except CertmountError as error:
                delay_s = self._retry_delay_s(error, attempt)
                if delay_s is None or _now() + delay_s >= deadline:
                    raise
            await asyncio.sleep(delay_s)
        raise AssertionError("unreachable")

    def _retry_delay_s(self, error: CertmountError, attempt: int) -> float | None:
        """Return the delay of the next attempt, or None if the failure ends a first request."""
        if error.reason.kind.scope is Scope.CALLER:
            return retry_delay_s(attempt=attempt, kind=error.reason.kind, jitter=self._rng())
        return 0.0 if error.reason.kind.scope is Scope.LOAD else None  # The rate controller delays the next turn.

    async def _send(self, issuer: str, call: Callable[[], Awaitable[T]], checked: str | None = None) -> T:
        """Send a request in the queue of ``issuer``, or a check for the issuer ``checked``."""
        other = self._queue(checked or issuer)
        queue = self._queue(issuer)
        epochs, other_epochs = queue.epochs, other.epochs
        try:
            result = await call()
        except CertmountError as error:
            # The check waited in the queue of another issuer, which can be available.
            if checked is not None and error.reason is Reason.ISSUER_UNAVAILABLE:
                self._record(checked, other, other_epochs, error)
            else:
                self._record(issuer, queue, epochs, error)
            raise
        self._record(issuer, queue, epochs, None)
        return result

    @asynccontextmanager
    async def _turn(self, issuer: str, request: QueuedRequest, deadline: float | None = None) -> AsyncIterator[float]:
        queue = self._queue(issuer)
        turn: asyncio.Future[float] = asyncio.get_running_loop().create_future()

        def on_turn(postponed_s: float) -> None:
            if not turn.done():
                turn.set_result(postponed_s)

        request.on_turn = on_turn
        queue.add(request)
        try:
            self._start_requests(issuer, queue)
            try:
                async with asyncio.timeout_at(deadline):
                    postponed_s = await turn
            except TimeoutError:
                problem = "other requests of this node have waited for the busy authority longer"
                raise CertmountError(Reason.AUTHORITY_OVERLOADED, problem) from None
            yield postponed_s
        finally:
            queue.end(request)
            self._start_requests(issuer, queue)

    def _queue(self, issuer: str) -> IssuerQueue:
        if issuer not in self._queues:
            if len(self._queues) >= _MAX_ISSUERS:
                # Prefer issuers without an outage. Every issuer that a pod makes up has one while the authority is unavailable.
                unused = [name for name, queue in self._queues.items() if queue.idle]
                healthy = [name for name in unused if self._queues[name].outage is None]
                for name in healthy or unused:
                    del self._queues[name]
            self._queues[issuer] = IssuerQueue(issuer, self._rng)
        return self._queues[issuer]

    def _start_requests(self, issuer: str, queue: IssuerQueue) -> None:
        """Start all requests that may start now, and set a timer if others wait for the end of a pause."""
        if (timer := self._timers.pop(issuer, None)) is not None:
            timer.cancel()
        while (request := queue.start_next(_now(), self._clock())) is not None:
            request.on_turn(0.0)
        if math.isfinite(wait_s := queue.wait_s(_now(), self._clock())):
            loop = asyncio.get_running_loop()
            self._timers[issuer] = loop.call_later(min(wait_s, _LONGEST_SLEEP_S), self._start_requests, issuer, queue)

    def _record(self, issuer: str, queue: IssuerQueue, epochs: tuple[int, ...], error: CertmountError | None) -> None:
        outage_s = queue.record(epochs, error, _now())
        if outage_s is None:
            return
        waiting = queue.waiting(RequestClass.RENEWAL)
        log.info("issuer available again", issuer=issuer, outage_s=round(outage_s, 1), waiting_renewals=len(waiting))
        for request in waiting:
            left_s = request.urgency - self._clock()
            postponed_s = catch_up_delay_s(outage_s=outage_s, left_s=left_s, jitter=self._rng())
            if postponed_s > 0:
                request.on_turn(postponed_s)


def _now() -> float:
    return asyncio.get_running_loop().time()
