"""Derives the condition of each volume's certificate from failed renewals and from time, and reports each change once."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from csi_driver.core.errors import CertmountError, FailureKind, Reason
from csi_driver.node.authority_messages import CertificateCondition
from csi_driver.node.renewal.certificate_reports import CertificateReporter
from csi_driver.node.scheduler import Scheduler
from csi_driver.node.volumes.remover import VolumeRemover
from csi_driver.node.volumes.volume import Volume, VolumeTable

_FAILURES_TO_REPORT = 2  # a single failure is often temporary
_NOT_REPORTED = (FailureKind.OVERLOADED, FailureKind.PENDING)
"""Failures that are no problem until the renewal is overdue. An overloaded authority needs fewer requests, not reports."""


@dataclass(eq=False)
class ConditionTracker:
    """Tracks the certificate conditions of all volumes. ``expiry_checks`` schedules the checks for overdue and expired ones.

    A report needs the token of the pod. Without one, only metrics and the volume's health show the condition.
    """

    volumes: VolumeTable
    remover: VolumeRemover
    outage: Callable[[str], CertmountError | None]
    reporter: CertificateReporter
    clock: Callable[[], float]

    def __post_init__(self) -> None:
        self.expiry_checks = Scheduler(self.clock, self._check_expiry)
        self.volumes.when_forgotten(self.expiry_checks.cancel)
        self.volumes.when_forgotten(self.reporter.forget)

    def watch(self, volume: Volume) -> None:
        if volume.record.issued_at < volume.record.not_after:  # False if the certificate could not be read.
            self.expiry_checks.schedule(volume.record.volume_id, volume.overdue_at)

    def renewal_succeeded(self, volume: Volume) -> None:
        """Report that the certificate has recovered, if another condition was reported before."""
        self._report(volume, CertificateCondition.CERTIFICATE_RECOVERED, "", "the certificate was renewed")

    def renewal_failed(self, volume: Volume, error: CertmountError) -> None:
        """Report a renewal that failed repeatedly, or that the driver does not retry."""
        if volume.renewal_stopped:
            message = f"the driver has stopped renewing the certificate: {error}"
            self._report(volume, CertificateCondition.RENEWAL_STOPPED, error.reason.word, message)
        elif (
            volume.renewal_failures >= _FAILURES_TO_REPORT
            and error.reason.kind not in _NOT_REPORTED
            and self.clock() < volume.overdue_at
        ):
            message = f"the renewal of the certificate failed: {error}"
            self._report(volume, CertificateCondition.RENEWAL_FAILING, error.reason.word, message)

    async def _check_expiry(self, volume_id: str) -> None:
        volume = self.volumes.get(volume_id)
        if volume is None or await self.remover.remove_if_pod_is_gone(volume):
            return
        now = self.clock()
        if now < volume.overdue_at:  # The certificate was renewed in the meantime, or the clock was set back.
            self.watch(volume)
            return
        cause = volume.failure or self.outage(volume.spec.issuer)
        reason, text = Reason.AUTHORITY_OVERLOADED.word, "the renewal waits in the driver's request queue"
        if cause is not None:
            reason, text = cause.reason.word, str(cause)
        if now >= volume.record.not_after:
            message = f"the certificate has expired: {text}"
            self._report(volume, CertificateCondition.CERTIFICATE_EXPIRED, reason, message)
            return
        self.expiry_checks.schedule(volume_id, volume.record.not_after)
        if not volume.renewal_stopped:
            message = f"the renewal of the certificate is overdue: {text}"
            self._report(volume, CertificateCondition.RENEWAL_OVERDUE, reason, message)

    def _report(self, volume: Volume, condition: CertificateCondition, reason: str, message: str) -> None:
        if volume.token is not None:
            self.reporter.report(volume.record.volume_id, volume.pod, condition, reason, message)
