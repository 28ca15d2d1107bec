"""Keys and certificates as they lie in the volumes: where a driver that starts anew finds what the one before had in memory."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from datetime import UTC, datetime

from csi_driver.core.certificates.keys import PrivateKey
from csi_driver.core.certificates.root_sets import RootSet
from csi_driver.core.certificates.verification import verify_certificate
from csi_driver.core.errors import CertmountError
from csi_driver.host.volume_store import VolumeStore
from csi_driver.node.issuance.enrolled import Enrolled, Wanted
from csi_driver.node.threads import in_thread
from csi_driver.node.volumes.volume import Volume, VolumeTable
from csi_driver.node.volumes.volume_files import expected_certificate, read_key_and_chain


class LiveCertificates:
    """Those of the published volumes. ``known`` gives the newest sets of roots, ``clock`` unix seconds."""

    def __init__(
        self,
        store: VolumeStore,
        volumes: VolumeTable,
        known: Callable[[], Mapping[str, RootSet]],
        clock: Callable[[], float],
    ) -> None:
        self._store = store
        self._volumes = volumes
        self._known = known
        self._clock = clock

    async def find(self, wanted: Wanted) -> Enrolled | None:
        """What a volume holds that asks for the same; none that stands in, is to be renewed, or is not the issuer's by its roots of now."""
        roots = self._known().get(wanted.issuer)
        if roots is None:
            return None
        for volume in self._alike(wanted, interim=False):
            record = volume.record
            if record.renew_at <= self._clock():
                continue  # its renewal may have been refused
            try:
                key, chain = await in_thread(None, read_key_and_chain, self._store.files_dir(record.volume_id))
                expected = expected_certificate(key, volume.spec, volume.pod, wanted.issuer)
                bundle = verify_certificate(chain, roots.roots, expected, datetime.fromtimestamp(self._clock(), UTC))
            except CertmountError:
                continue  # as good as none: it is renewed for other reasons
            trust = {wanted.issuer: roots}
            return Enrolled(key, bundle, trust, record.issued_at, record.renew_at, record.not_after)
        return None

    async def key_on_its_way(self, wanted: Wanted) -> PrivateKey | None:
        """The key of a volume with a stand-in: an order for it is on its way."""
        for volume in self._alike(wanted, interim=True):
            try:
                return (await in_thread(None, read_key_and_chain, self._store.files_dir(volume.record.volume_id)))[0]
            except CertmountError:
                continue
        return None

    def _alike(self, wanted: Wanted, *, interim: bool) -> Iterator[Volume]:
        alike = (
            volume
            for volume in self._volumes
            if volume.record.interim == interim
            and Wanted.of(volume.pod, volume.spec, volume.record.volume_id if wanted.volume_id else "") == wanted
        )
        yield from sorted(alike, key=lambda volume: volume.record.issued_at, reverse=True)
