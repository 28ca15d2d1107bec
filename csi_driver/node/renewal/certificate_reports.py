"""Sends reports of certificate conditions to the authority, which creates pod events. Reports never delay renewals."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable

import structlog

from csi_driver.core.errors import CertmountError, FailureKind, Reason
from csi_driver.core.renewal import retry_delay_s
from csi_driver.core.secret import Secret
from csi_driver.node.authority_messages import CertificateCondition, CertificateReport

log = structlog.get_logger(__name__)

_MAX_WAITING = 256
"""Volumes with a report that waits. A node has 110 pods by default; logs, metrics and volume health show the others."""
_MAX_ATTEMPTS = 5
_BURST = 10
_INTERVAL_S = 30.0
"""After a burst, the interval between reports: a failure of all pods on all nodes must not overload the authority."""
_MAX_MESSAGE_LENGTH = 1024  # the limit of a Kubernetes event


class CertificateReporter:
    """A bounded queue with the newest report of each volume.

    A newer report replaces one that was not sent yet. If a certificate recovers before its condition was reported, nothing
    is sent. So the end of an outage does not cause many reports.
    """

    def __init__(self, send: Callable[[CertificateReport], Awaitable[None]], rng: Callable[[], float]) -> None:
        self._send_report = send
        self._rng = rng
        self._waiting: dict[str, CertificateReport] = {}
        self._reported: dict[str, CertificateCondition] = {}
        self._sending = ""
        self._added = asyncio.Event()
        self._allowed = float(_BURST)
        self._failures = 0

    def report(
        self, volume_id: str, token: Secret[str], condition: CertificateCondition, reason: str, message: str
    ) -> None:
        """Add a report to the queue. A full queue drops the report."""
        if volume_id not in self._waiting and len(self._waiting) >= _MAX_WAITING:
            log.warning("report dropped", volume=volume_id, condition=condition.name, error="the report queue is full")
            return
        if len(message) > _MAX_MESSAGE_LENGTH:
            message = message[: _MAX_MESSAGE_LENGTH - 3] + "..."
        self._waiting[volume_id] = CertificateReport(token, condition, reason, message)
        self._added.set()

    def forget(self, volume_id: str) -> None:
        self._waiting.pop(volume_id, None)
        self._reported.pop(volume_id, None)
        if self._sending == volume_id:
            self._sending = ""

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
            volume_id = next(iter(self._waiting))
            report = self._waiting.pop(volume_id)
            if report.condition is not self._reported.get(volume_id, CertificateCondition.CERTIFICATE_RECOVERED):
                self._allowed -= 1
                await self._send(volume_id, report)

    async def _send(self, volume_id: str, report: CertificateReport) -> None:
        """Send a report. Retry a few times, unless there is a newer report or the volume was removed."""
        self._sending = volume_id
        for attempt in range(1, _MAX_ATTEMPTS + 1):
            error = await self._try_to_send(report)
            if error is None:
                self._failures = 0
                if self._sending:
                    self._reported[volume_id] = report.condition
                return
            if not error.retryable or attempt == _MAX_ATTEMPTS:
                log.warning("report failed", volume=volume_id, condition=report.condition.name, error=str(error))
                return
            self._failures += 1
            self._allowed = 0.0
            await asyncio.sleep(retry_delay_s(attempt=self._failures, kind=FailureKind.UNAVAILABLE, jitter=self._rng()))
            if volume_id in self._waiting or not self._sending:
                return

    async def _try_to_send(self, report: CertificateReport) -> CertmountError | None:
        try:
            await self._send_report(report)
        except CertmountError as error:
            return error
        except Exception as error:  # noqa: BLE001  # A defect must not end the reports; its text could contain a token.
            return CertmountError(Reason.INTERNAL, f"an internal error ({type(error).__name__})")
        return None
