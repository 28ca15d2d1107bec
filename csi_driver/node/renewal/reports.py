"""Tells the authority what has become of certificates, so that it is said on the pods' events. Never in a renewal's way."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Protocol

import structlog

from csi_driver.core.errors import CertmountError, FailureKind, Reason
from csi_driver.core.renewal import retry_delay_s
from csi_driver.core.secret import Secret
from csi_driver.node.authority_messages import CertificateCondition, CertificateReport

log = structlog.get_logger(__name__)

_MOST_WAITING = 256
"""Volumes; a node has 110 pods by default, and what is beyond is in logs, metrics and the volumes' health."""
_MOST_TRIES = 5
"""What can't be told by then is old news."""
_AT_ONCE = 10
_GAP_S = 30.0
"""So many at once, then one in so many seconds: where all pods of all nodes are in trouble, telling it must not be more."""
_MESSAGE_LENGTH = 1024
"""As much as an event holds."""


class Listener(Protocol):
    """Whoever is told."""

    async def report(self, report: CertificateReport) -> None:
        """As :meth:`csi_driver.node.authority_client.AuthorityClient.report`."""


class Reports:
    """A bounded queue in which each volume has one place: what is newer replaces what has not been told yet.

    Where a pod has recovered before anyone heard of its trouble, there is nothing to tell: so an outage that ends is no
    flood of reports.
    """

    def __init__(self, listener: Listener, rng: Callable[[], float]) -> None:
        self._listener = listener
        self._rng = rng
        self._waiting: dict[str, CertificateReport] = {}
        self._told: dict[str, CertificateCondition] = {}
        self._under_way = ""
        self._came = asyncio.Event()
        self._allowed = float(_AT_ONCE)
        self._failures = 0

    def tell(self, volume_id: str, report: CertificateReport) -> None:
        """Puts a change in the queue, where it is passed over if that is full."""
        if volume_id not in self._waiting and len(self._waiting) >= _MOST_WAITING:
            log.warning("not reported", volume=volume_id, condition=report.condition.name, error="too many wait")
            return
        self._waiting[volume_id] = report
        self._came.set()

    def forget(self, volume_id: str) -> None:
        """Nothing more is told of a volume that is gone."""
        self._waiting.pop(volume_id, None)
        self._told.pop(volume_id, None)
        if self._under_way == volume_id:
            self._under_way = ""

    async def run(self) -> None:
        """Sends what comes, one after the other, until cancelled."""
        clock = asyncio.get_running_loop().time
        filled_at = clock()
        while True:
            await self._came.wait()
            if self._allowed < 1:
                await asyncio.sleep((1 - self._allowed) * _GAP_S * (0.75 + 0.5 * self._rng()))
            self._allowed, filled_at = min(self._allowed + (clock() - filled_at) / _GAP_S, _AT_ONCE), clock()
            if not self._waiting:
                self._came.clear()
                continue
            volume_id = next(iter(self._waiting))
            report = self._waiting.pop(volume_id)
            if report.condition is not self._told.get(volume_id, CertificateCondition.CERTIFICATE_RECOVERED):
                self._allowed -= 1
                await self._send(volume_id, report)

    async def _send(self, volume_id: str, report: CertificateReport) -> None:
        """Tries some times, while nothing newer has come for the volume."""
        self._under_way = volume_id
        failure: CertmountError | None = None
        for attempt in range(1, _MOST_TRIES + 1):
            failure = await self._try(report)
            if failure is None:
                self._failures = 0
                if self._under_way:
                    self._told[volume_id] = report.condition
                return
            if not failure.retryable or attempt == _MOST_TRIES:
                break
            self._failures += 1
            self._allowed = 0.0
            await asyncio.sleep(retry_delay_s(attempt=self._failures, kind=FailureKind.UNAVAILABLE, jitter=self._rng()))
            if volume_id in self._waiting or not self._under_way:
                return
        log.warning("not reported", volume=volume_id, condition=report.condition.name, error=str(failure))

    async def _try(self, report: CertificateReport) -> CertmountError | None:
        try:
            await self._listener.report(report)
        except CertmountError as error:
            return error
        except Exception as error:  # noqa: BLE001  # renewals must outlive a defect here; its text may quote a token
            return CertmountError(Reason.INTERNAL, f"a defect in certmount ({type(error).__name__})")
        return None


def report_of(token: Secret[str], condition: CertificateCondition, reason: str, message: str) -> CertificateReport:
    """A report whose message is as long as may be."""
    short = message if len(message) <= _MESSAGE_LENGTH else message[: _MESSAGE_LENGTH - 3] + "..."
    return CertificateReport(token, condition, reason, short)
