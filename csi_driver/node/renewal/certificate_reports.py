"""Sends reports of certificate conditions to the authority, which creates pod events. Reports never delay renewals."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from dataclasses import dataclass

import structlog

from csi_driver.core.errors import CertmountError, FailureKind, Reason
from csi_driver.core.renewal import retry_delay_s
from csi_driver.core.secret import Secret
from csi_driver.core.shares import FairShares
from csi_driver.core.texts import shortened
from csi_driver.node.authority_messages import CertificateCondition, CertificateReport
from csi_driver.node.fair_queue import FairQueue
from csi_driver.node.pods import Pod

log = structlog.get_logger(__name__)

MAX_WAITING_REPORTS = 512
"""Volumes with a report that waits. A single namespace gets half of them; logs, metrics and volume health show the others."""
_MAX_ATTEMPTS = 5
_BURST = 10
_INTERVAL_S = 30.0
"""After a burst, the interval between reports: a failure of all pods on all nodes must not overload the authority."""
_MAX_MESSAGE_LENGTH = 1024  # the limit of a Kubernetes event


@dataclass(eq=False, slots=True)
class _WaitingReport:
    pod: Pod
    volume_id: str
    condition: CertificateCondition
    reason: str
    message: str
    urgency: float = 0.0


class CertificateReporter:
    """A bounded queue with the newest report of each volume, in the order of :class:`FairQueue`.

    A newer report replaces one that was not sent yet. If a certificate recovers before its condition was reported, nothing
    is sent. So the end of an outage does not cause many reports.

    ``token_of`` returns the token of a volume's pod. It is read for each attempt, because a report can wait for longer than
    the token is valid.
    """

    def __init__(
        self,
        send: Callable[[CertificateReport], Awaitable[None]],
        token_of: Callable[[str], Secret[str] | None],
        rng: Callable[[], float],
    ) -> None:
        self._send_report = send
        self._token_of = token_of
        self._rng = rng
        self._waiting: dict[str, _WaitingReport] = {}
        self._queue: FairQueue[_WaitingReport] = FairQueue()
        self._shares = FairShares("reports that wait on this node", MAX_WAITING_REPORTS)
        self._reported: dict[str, CertificateCondition] = {}
        self._sending = ""
        self._added = asyncio.Event()
        self._allowed = float(_BURST)
        self._failures = 0

    def report(
        self,
        volume_id: str,
        pod: Pod,
        condition: CertificateCondition,
        reason: str,
        message: str,
    ) -> None:
        """Add a report to the queue. It is dropped if the share of the pod's namespace is used up."""
        message = shortened(message, _MAX_MESSAGE_LENGTH)
        if (waiting := self._waiting.get(volume_id)) is not None:
            waiting.condition, waiting.reason, waiting.message = condition, reason, message
            return
        if volume_id != self._sending and condition is self._last_reported(volume_id):
            return  # a successful renewal must not use up the share of failures
        try:
            self._shares.take(pod.tenant)
        except CertmountError as error:
            log.warning("report dropped", volume=volume_id, condition=condition.name, error=str(error))
            return
        self._waiting[volume_id] = _WaitingReport(pod, volume_id, condition, reason, message)
        self._queue.add(self._waiting[volume_id])
        self._added.set()

    def forget(self, volume_id: str) -> None:
        if volume_id in self._waiting:
            self._queue.end(self._remove(volume_id), started=False)
        self._reported.pop(volume_id, None)
        if self._sending == volume_id:
            self._sending = ""

    def _remove(self, volume_id: str) -> _WaitingReport:
        waiting = self._waiting.pop(volume_id)
        self._shares.give_back(waiting.pod.tenant)
        return waiting

    def _last_reported(self, volume_id: str) -> CertificateCondition:
        return self._reported.get(volume_id, CertificateCondition.CERTIFICATE_RECOVERED)

    async def run(self) -> None:
        clock = asyncio.get_running_loop().time
        refilled_at = clock()
        while True:
            await self._added.wait()
            if self._allowed < 1:
                await asyncio.sleep((1 - self._allowed) * _INTERVAL_S * (0.75 + 0.5 * self._rng()))
            self._allowed = min(self._allowed + (clock() - refilled_at) / _INTERVAL_S, _BURST)
            refilled_at = clock()
            if not self._waiting:
                self._added.clear()
                continue
            waiting = self._queue.start_next()
            self._queue.end(waiting, started=True)
            self._remove(waiting.volume_id)
            if waiting.condition is not self._last_reported(waiting.volume_id):
                self._allowed -= 1
                await self._send(waiting)

    async def _send(self, report: _WaitingReport) -> None:
        """Send a report. Retry a few times, unless there is a newer report or the volume was removed."""
        self._sending = volume_id = report.volume_id
        for attempt in range(1, _MAX_ATTEMPTS + 1):
            error = await self._try_to_send(report)
            if error is None:
                self._failures = 0
                if self._sending:
                    self._reported[volume_id] = report.condition
                return
            needs_token = error.reason.kind is FailureKind.TOKEN_NEEDED  # the others must not wait for it
            if not error.retryable or needs_token or attempt == _MAX_ATTEMPTS:
                log.warning("report failed", volume=volume_id, condition=report.condition.name, error=str(error))
                return
            self._failures += 1
            self._allowed = 0.0
            await asyncio.sleep(retry_delay_s(attempt=self._failures, kind=FailureKind.UNAVAILABLE, jitter=self._rng()))
            if volume_id in self._waiting or not self._sending:
                return

    async def _try_to_send(self, report: _WaitingReport) -> CertmountError | None:
        token = self._token_of(report.volume_id)
        if token is None:
            return CertmountError(Reason.TOKEN_MISSING, "the pod has no token")
        try:
            await self._send_report(CertificateReport(token, report.condition, report.reason, report.message))
        except CertmountError as error:
            return error
        except Exception as error:  # noqa: BLE001  # A defect must not end the reports; its text could contain a token.
            return CertmountError(Reason.INTERNAL, f"an internal error ({type(error).__name__})")
        return None
