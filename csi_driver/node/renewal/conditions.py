"""What state a volume's certificate is in, by its failures and by the clock; each change of it is reported once."""

from __future__ import annotations

from collections.abc import Callable

from csi_driver.core.errors import Reason
from csi_driver.node.authority_messages import CertificateCondition
from csi_driver.node.issuance.lanes import Lanes
from csi_driver.node.renewal.reports import Reports, report_of
from csi_driver.node.renewal.rotation import Rotation
from csi_driver.node.volumes.remover import VolumeRemover
from csi_driver.node.volumes.volume import Volume, VolumeTable

_FAILURES = 2
"""One may be chance; the second in a row is worth telling."""


class Conditions:
    """The conditions of all volumes. ``clock_of_ends`` is the clock that sees certificates become overdue and end.

    Without the pod's token nothing can be told; metrics and the volume's health tell it all the same.
    """

    def __init__(
        self, volumes: VolumeTable, removal: VolumeRemover, lanes: Lanes, reports: Reports, clock: Callable[[], float]
    ) -> None:
        self._volumes = volumes
        self._removal = removal
        self._lanes = lanes
        self._reports = reports
        self._clock = clock
        self.clock_of_ends = Rotation(clock, self._look)
        volumes.when_forgotten(self.clock_of_ends.cancel)
        volumes.when_forgotten(reports.forget)

    def keep(self, volume: Volume) -> None:
        """Watches the end of a certificate that the volume holds from now on; one that nobody could read is renewed at once."""
        if volume.record.issued_at < volume.record.not_after:
            self.clock_of_ends.schedule(volume.record.volume_id, volume.overdue_at)

    def renewed(self, volume: Volume) -> None:
        """A renewal came through."""
        self._tell(volume, CertificateCondition.CERTIFICATE_RECOVERED, "", "the certificate was renewed")

    def failed(self, volume: Volume) -> None:
        """A renewal failed; ``volume`` says why, and whether there will be another."""
        if volume.failure is None:
            return
        reason, text = volume.failure.reason, str(volume.failure)
        if volume.dropped:
            self._tell(
                volume,
                CertificateCondition.RENEWAL_STOPPED,
                reason.word,
                f"the certificate is not renewed any more: {text}",
            )
        elif (
            volume.attempt >= _FAILURES
            and reason is not Reason.AUTHORITY_OVERLOADED  # it asks for less, and not to be told so
            and reason is not Reason.ISSUANCE_PENDING  # it is on its way, and there is time
            and self._clock() < volume.overdue_at
        ):
            self._tell(
                volume,
                CertificateCondition.RENEWAL_FAILING,
                reason.word,
                f"the certificate could not be renewed: {text}",
            )

    async def _look(self, volume_id: str) -> None:
        """The moment has come at which a certificate that was not renewed is overdue, or has ended."""
        volume = self._volumes.get(volume_id)
        if volume is None or await self._removal.drop_if_gone(volume):
            return
        now = self._clock()
        if now < volume.overdue_at:  # renewed meanwhile
            return
        why = volume.failure or self._lanes.trouble(volume.spec.issuer)
        reason, text = (
            (why.reason.word, str(why)) if why else (Reason.AUTHORITY_OVERLOADED.word, "others are more urgent")
        )
        if now >= volume.record.not_after:
            self._tell(volume, CertificateCondition.CERTIFICATE_EXPIRED, reason, f"the certificate has expired: {text}")
            return
        self.clock_of_ends.schedule(volume_id, volume.record.not_after)
        if not volume.dropped:
            self._tell(
                volume,
                CertificateCondition.RENEWAL_OVERDUE,
                reason,
                f"the renewal of the certificate is overdue: {text}",
            )

    def _tell(self, volume: Volume, condition: CertificateCondition, reason: str, message: str) -> None:
        if volume.token is not None:
            self._reports.tell(volume.record.volume_id, report_of(volume.token.text, condition, reason, message))
