"""The published volumes of the node: their records, and their state in memory."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple
from weakref import WeakValueDictionary

from csi_driver.core.attributes import CertificateSpec
from csi_driver.core.certificates.root_sets import RootSet, trusted_root_set_names
from csi_driver.core.errors import CertmountError, FailureKind
from csi_driver.core.renewal import overdue_time
from csi_driver.core.secret import Secret
from csi_driver.host.volume_record import VolumeRecord
from csi_driver.node.pods import Pod, PodToken
from csi_driver.node.volumes.volume_files import FileAccess, VolumeFiles


class VolumeProblem(NamedTuple):
    """Why a volume is unhealthy: a CamelCase reason, a message, and whether a new container would not see the files."""

    reason: str
    message: str
    inaccessible: bool = False


@dataclass(slots=True)
class Volume:
    """A published volume. Only ``record`` survives a restart of the driver."""

    record: VolumeRecord
    spec: CertificateSpec
    token: PodToken | None = None
    failure: CertmountError | None = None  # the error of the last renewal, or None if it succeeded
    renewal_failures: int = 0  # consecutive failures
    renewal_stopped: bool = False
    """True if the driver does not retry the renewal before the policy changes, because the policy denies the pod."""
    renewing: bool = False
    root_sets: Mapping[str, RootSet] = field(default_factory=dict)
    """The root sets that the files contain. Empty after a restart, until the driver has read the files."""
    root_failures: int = 0  # consecutive failures to write new roots
    password: Secret[bytes] | None = None
    """The pod's password of the stores, if the files are known to have it. A republish compares them otherwise."""

    @property
    def pod(self) -> Pod:
        return pod_of(self.record)

    @property
    def trusted_names(self) -> tuple[str, ...]:
        return trusted_root_set_names(self.spec, interim=self.record.interim)

    def files(self, files_dir: Path) -> VolumeFiles:
        """Return the files in the volume's directory."""
        return VolumeFiles(files_dir, self.spec.layout, FileAccess.of(self.spec, self.record.mount_group))

    @property
    def overdue_at(self) -> float:
        return overdue_time(self.record.renew_at, self.record.not_after)

    def keeps_interim_certificate(self, now: float) -> bool:
        """Return True if the volume has an interim certificate in the first half of its lifetime.

        A newer interim certificate would only cause applications to reload their files.
        """
        return self.record.interim and now < (self.record.issued_at + self.record.not_after) / 2

    def problem(self, now: float, issuer_failure: CertmountError | None = None) -> VolumeProblem | None:
        """Return what is wrong with the certificate, or None if it is healthy.

        ``issuer_failure`` is the reason why the issuer signs no certificates at present. It affects each volume that is
        due for renewal.
        """
        failure = self.failure or (issuer_failure if now >= self.record.renew_at else None)
        if now >= self.record.not_after:
            cause = f"; the renewal fails: {failure}" if failure else ""
            return VolumeProblem("CertificateExpired", f"the certificate of pod {self.pod} has expired{cause}")
        if failure is None or (failure.reason.kind is FailureKind.PENDING and now < self.overdue_at):
            return None
        retry = "; the driver does not retry before the policy changes" if self.renewal_stopped else ""
        message = f"the renewal of the certificate of pod {self.pod} failed{retry}: {failure}"
        return VolumeProblem(failure.reason.word, message)


def pod_of(record: VolumeRecord) -> Pod:
    return Pod(record.pod_namespace, record.pod_name, record.pod_uid, record.service_account)


class VolumeTable:
    """All published volumes of the node by volume ID, with one lock for each ID. Change a volume only with its lock held."""

    def __init__(self) -> None:
        self._volumes: dict[str, Volume] = {}
        self._locks: WeakValueDictionary[str, asyncio.Lock] = WeakValueDictionary()
        self._on_forget: list[Callable[[str], None]] = []
        self._on_replace: list[Callable[[Volume], None]] = []

    def __iter__(self) -> Iterator[Volume]:
        """Iterate over a copy, so that the loop can change the table."""
        return iter(list(self._volumes.values()))

    def lock(self, volume_id: str) -> asyncio.Lock:
        """Return the lock of a volume ID, known or not.

        Do not hold the lock of a published volume during a request to the authority: the kubelet's calls would wait.
        """
        return self._locks.setdefault(volume_id, asyncio.Lock())

    def get(self, volume_id: str) -> Volume | None:
        return self._volumes.get(volume_id)

    def token_of(self, volume_id: str) -> Secret[str] | None:
        """Return the newest token of the volume's pod, if there is one."""
        volume = self._volumes.get(volume_id)
        return None if volume is None or volume.token is None else volume.token.text

    def has(self, volume: Volume) -> bool:
        """Return False if the volume was removed, even if its ID was published again."""
        return self._volumes.get(volume.record.volume_id) is volume

    def keep(self, volume: Volume) -> None:
        self._volumes[volume.record.volume_id] = volume

    def forget(self, volume_id: str) -> None:
        """Remove the volume, if there is one, and call all callbacks."""
        self._volumes.pop(volume_id, None)
        for callback in self._on_forget:
            callback(volume_id)

    def files_replaced(self, volume: Volume) -> None:
        """Call all callbacks: the files of a published volume were replaced."""
        for callback in self._on_replace:
            callback(volume)

    def when_replaced(self, callback: Callable[[Volume], None]) -> None:
        self._on_replace.append(callback)

    def when_forgotten(self, callback: Callable[[str], None]) -> None:
        self._on_forget.append(callback)
