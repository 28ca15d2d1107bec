"""Finds keys and certificates in the published volumes. After a restart, they replace the driver's in-memory state."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime

from csi_driver.core.certificates.keys import PrivateKey, key_fingerprint
from csi_driver.core.certificates.root_sets import RootSet
from csi_driver.core.certificates.verification import verify_certificate
from csi_driver.core.errors import CertmountError
from csi_driver.host.volume_store import VolumeStore
from csi_driver.node.issuance.certificate_request import ObtainedCertificate, RequestKey
from csi_driver.node.threads import in_thread
from csi_driver.node.volumes.volume import Volume, VolumeTable
from csi_driver.node.volumes.volume_files import expected_certificate, read_key_and_chain


@dataclass(eq=False)
class StoredCertificates:
    """Reads the files of the published volumes. ``known`` returns the newest root sets, ``clock`` unix seconds."""

    store: VolumeStore
    volumes: VolumeTable
    known: Callable[[], Mapping[str, RootSet]]
    clock: Callable[[], float]
    replace_keys: Collection[str] = frozenset()
    """Fingerprints of keys that get no other certificate, because the CA may have revoked theirs."""

    async def find(self, key: RequestKey) -> ObtainedCertificate | None:
        """Return the newest valid certificate of the volumes with this key.

        Ignore interim certificates, those that are due for renewal, because the authority may have rejected it, and those
        whose key must be replaced.
        """
        roots = self.known().get(key.issuer)
        if roots is None:
            return None
        refused = await self._keys_to_replace(key)
        for volume in self._matching(key, interim=False):
            record, now = volume.record, self.clock()
            if record.renew_at <= now or (pair := await self._read(volume)) is None:
                continue
            private_key, chain = pair
            if key_fingerprint(private_key.public_key()) in refused:
                continue
            expected = expected_certificate(private_key, volume.spec, volume.pod, key.issuer)
            try:
                verified = verify_certificate(chain, roots.roots, expected, datetime.fromtimestamp(now, UTC))
            except CertmountError:
                continue
            return ObtainedCertificate(
                key=private_key,
                verified=verified,
                root_sets={key.issuer: roots},
                issued_at=record.issued_at,
                renew_at=record.renew_at,
                not_after=record.not_after,
            )
        return None

    async def find_key(self, key: RequestKey, *, reuse: bool) -> PrivateKey | None:
        """Return the private key to certify, or None for a new one.

        It is the key of a volume with an interim certificate, because its order at the external issuer is pending. With
        ``reuse``, it can be the key of any volume. A key that must be replaced is never found.
        """
        refused = await self._keys_to_replace(key)
        for interim in (True, False) if reuse else (True,):
            for volume in self._matching(key, interim=interim):
                if (pair := await self._read(volume)) and key_fingerprint(pair[0].public_key()) not in refused:
                    return pair[0]
        return None

    async def must_replace(self, key: RequestKey, private_key: PrivateKey) -> bool:
        """Return whether the private key gets no other certificate."""
        return key_fingerprint(private_key.public_key()) in await self._keys_to_replace(key)

    async def _keys_to_replace(self, key: RequestKey) -> set[str]:
        volumes = (*self._matching(key, interim=True), *self._matching(key, interim=False))
        denied = [await self.key_fingerprint(volume) for volume in volumes if volume.record.replace_key]
        return {*self.replace_keys, *filter(None, denied)}

    async def key_fingerprint(self, volume: Volume) -> str | None:
        pair = await self._read(volume)
        return key_fingerprint(pair[0].public_key()) if pair is not None else None

    async def _read(self, volume: Volume) -> tuple[PrivateKey, list[bytes]] | None:
        try:
            return await in_thread(None, read_key_and_chain, self.store.files_dir(volume.record.volume_id))
        except CertmountError:
            return None  # The volume's renewal or health check reports it.

    def _matching(self, key: RequestKey, *, interim: bool) -> list[Volume]:
        """Return the volumes with this key, the most recently issued certificate first."""
        own = self.volumes.get(key.volume_id)
        candidates = self.volumes if not key.volume_id else () if own is None else (own,)
        matching = [
            volume
            for volume in candidates
            if volume.record.interim == interim
            and volume.record.pod_namespace == key.namespace
            and RequestKey.of(volume.pod, volume.spec, key.volume_id) == key
        ]
        return sorted(matching, key=lambda volume: volume.record.issued_at, reverse=True)
