"""The published volumes as the driver knows them: what survives a restart in their records, and what only memory holds."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from weakref import WeakValueDictionary

from csi_driver.core.certificates.root_sets import RootSet, trusted_root_set_names
from csi_driver.core.errors import CertmountError, Reason
from csi_driver.core.spec import CertificateSpec
from csi_driver.host.volume_record import VolumeRecord
from csi_driver.node.pods import Pod, PodToken
from csi_driver.node.publishing.publish_request import PublishRequest
from csi_driver.node.volumes.volume_files import FileAccess


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
    dropped: bool = False
    """True where there are no further tries to renew it, as its pod is denied."""
    renewing: bool = False
    trusts: Mapping[str, RootSet] = field(default_factory=dict)
    """The sets whose roots its root.crt is known to hold; none after a restart, until it was looked at."""
    trust_attempt: int = 0
    """Failures in a row to write newer roots."""

    @property
    def pod(self) -> Pod:
        """Whose volume it is."""
        record = self.record
        return Pod(record.pod_namespace, record.pod_name, record.pod_uid, record.service_account)

    @property
    def trusted(self) -> tuple[str, ...]:
        """The sets that it trusts by name: that of its issuer first."""
        return trusted_root_set_names(self.spec, interim=self.record.interim)

    @property
    def readers(self) -> FileAccess:
        """Who may read its key; the volume's own attribute wins over the pod's fsGroup."""
        return FileAccess(self.record.mount_group if self.spec.fs_group is None else self.spec.fs_group)

    @property
    def overdue_at(self) -> float:
        """When half of what was left of the life at the moment of renewal is gone (unix seconds)."""
        return (self.record.renew_at + self.record.not_after) / 2

    def stands_in_well(self, now: float) -> bool:
        """True while it holds a certificate that stands in, of which half of the life is left: applications read each new one."""
        return self.record.interim and now < (self.record.issued_at + self.record.not_after) / 2

    def trouble(self, now: float, away: CertmountError | None = None) -> tuple[str, str] | None:
        """What is wrong with the certificate at a moment (unix seconds): a CamelCase reason and a text for people; None when it is well.

        ``away`` says why there are no certificates of its issuer now, which is the trouble of each volume that needs one.
        """
        failure = self.failure or (away if now >= self.record.renew_at else None)
        if now >= self.record.not_after:
            why = f"; its renewal fails: {failure}" if failure else ""
            return "CertificateExpired", f"the certificate of pod {self.pod} has expired{why}"
        # An order at a public CA may take its minutes; that is no trouble while there is time.
        on_its_way = failure is not None and failure.reason is Reason.ISSUANCE_PENDING and now < self.overdue_at
        if failure is not None and not on_its_way:
            dropped = " and will not be before the policy changes" if self.dropped else ""
            return failure.reason.word, f"the certificate of pod {self.pod} is not renewed{dropped}: {failure}"
        return None


class VolumeTable:
    """All volumes of this node by their ids, and a lock for each: a volume is changed under its lock only."""

    def __init__(self) -> None:
        self._volumes: dict[str, Volume] = {}
        self._locks: WeakValueDictionary[str, asyncio.Lock] = WeakValueDictionary()
        self._forgotten: list[Callable[[str], None]] = []

    def __iter__(self) -> Iterator[Volume]:
        """Those there are now; the loop may change them."""
        return iter(list(self._volumes.values()))

    def lock(self, volume_id: str) -> asyncio.Lock:
        """The lock of a volume, known or not; held for work on this node only, never while the authority is asked for one that is known."""
        return self._locks.setdefault(volume_id, asyncio.Lock())

    def get(self, volume_id: str) -> Volume | None:
        """The volume, None for one that is not known."""
        return self._volumes.get(volume_id)

    def has(self, volume: Volume) -> bool:
        """False once it was forgotten, also when it has been published anew."""
        return self._volumes.get(volume.record.volume_id) is volume

    def keep(self, volume: Volume) -> None:
        """Knows it from now on."""
        self._volumes[volume.record.volume_id] = volume

    def forget(self, volume_id: str) -> None:
        """Knows it no more, and tells everyone who asked for that; an unknown one too."""
        self._volumes.pop(volume_id, None)
        for tell in self._forgotten:
            tell(volume_id)

    def when_forgotten(self, tell: Callable[[str], None]) -> None:
        """Has ``tell`` called with the id of each volume that is forgotten."""
        self._forgotten.append(tell)


def new_record(
    request: PublishRequest,
    target: str,
    issued_at: float,
    renew_at: float,
    not_after: float,
    *,
    interim: bool = False,
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
        interim=interim,
    )
