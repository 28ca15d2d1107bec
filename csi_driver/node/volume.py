"""A published volume as the driver knows it: what survives a restart in its record, and what only memory holds."""

from __future__ import annotations

from dataclasses import dataclass

from csi_driver.core.errors import CertmountError
from csi_driver.core.spec import CertificateSpec
from csi_driver.host.volumes import VolumeRecord
from csi_driver.node.contents import Readers
from csi_driver.node.request import Pod, PodToken, PublishRequest


@dataclass(slots=True)
class Volume:
    """A published volume: its record, what it asks for, and what only memory holds."""

    record: VolumeRecord
    spec: CertificateSpec
    token: PodToken | None = None
    failure: CertmountError | None = None
    """Why the last renewal failed; None when it did not."""
    attempt: int = 0
    """Renewals that failed in a row."""
    renewing: bool = False

    @property
    def pod(self) -> Pod:
        """Whose volume it is."""
        record = self.record
        return Pod(record.pod_namespace, record.pod_name, record.pod_uid, record.service_account)

    @property
    def readers(self) -> Readers:
        """Who may read its key; the volume's own attribute wins over the pod's fsGroup."""
        return Readers(self.record.mount_group if self.spec.fs_group is None else self.spec.fs_group)

    def trouble(self, now: float) -> tuple[str, str] | None:
        """What is wrong with the certificate at a moment (unix seconds): a CamelCase reason and a text for people; None when it is well."""
        if now >= self.record.not_after:
            why = f"; its renewal fails: {self.failure}" if self.failure else ""
            return "CertificateExpired", f"the certificate of pod {self.pod} has expired{why}"
        if self.failure is not None:
            return self.failure.reason.word, f"the certificate of pod {self.pod} is not renewed: {self.failure}"
        return None


def new_record(
    request: PublishRequest, target: str, issued_at: float, renew_at: float, not_after: float
) -> VolumeRecord:
    return VolumeRecord(
        volume_id=request.volume_id,
        pod_namespace=request.pod.namespace,
        pod_name=request.pod.name,
        pod_uid=request.pod.uid,
        service_account=request.pod.service_account,
        attributes=dict(request.attributes),
        mount_group=request.mount_group,
        targets=(target,),
        issued_at=issued_at,
        renew_at=renew_at,
        not_after=not_after,
    )
