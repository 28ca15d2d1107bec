"""Publish a volume: NodePublishVolume from the call to the mounted files.

The steps are: parse the call, lock the volume, republish it if it has files, parse its attributes and target path, obtain a
certificate, choose its roots, render and write its files, mount them, schedule the renewal, and write newer roots.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

import structlog

from csi_driver._proto import csi_pb2
from csi_driver.core.certificates.root_sets import merge_roots
from csi_driver.core.errors import CertmountError
from csi_driver.host.target_paths import check_target
from csi_driver.host.volume_store import VolumeStore
from csi_driver.node.issuance.certificate_client import CertificateClient
from csi_driver.node.issuance.certificate_request import CertificateRequest, ObtainedCertificate
from csi_driver.node.publishing.publish_request import PublishRequest, parse_declaration, parse_publish
from csi_driver.node.publishing.published_volumes import PublishedVolumes
from csi_driver.node.publishing.restore import VolumeRestorer, new_record
from csi_driver.node.renewal.renewals import Renewals
from csi_driver.node.threads import in_thread
from csi_driver.node.trust.root_distribution import RootDistribution
from csi_driver.node.volumes.volume import Volume, VolumeTable
from csi_driver.node.volumes.volume_files import write_certificate

log = structlog.get_logger(__name__)


@dataclass(frozen=True, slots=True)
class Publisher:
    """Publishes the volumes of the node."""

    kubelet_dir: Path
    store: VolumeStore
    volumes: VolumeTable
    published: PublishedVolumes
    restorer: VolumeRestorer
    certificates: CertificateClient
    roots: RootDistribution
    renewals: Renewals

    async def publish(self, call: csi_pb2.NodePublishVolumeRequest) -> None:
        """Mount the files of a volume at its target path, or update a volume that is already published.

        Kubelets before 1.37 (kubernetes#121271) remove the mount of a running pod if a republish fails. Therefore this
        call never fails for a volume whose files are mounted.

        Raises CertmountError: why the first publish failed. Nothing of the volume remains.
        """
        try:
            request = parse_publish(call, self.kubelet_dir)
            async with self.volumes.lock(request.volume_id):
                if volume := await self._find_existing(request):
                    await self._republish(volume, request)
                else:
                    await self._publish_first(request)
        except CertmountError as error:
            if not self.published.is_mounted(call.volume_id, call.target_path):
                raise
            log.warning("republish failed; the volume keeps its files", reason=error.reason.word, error=str(error))

    async def _find_existing(self, request: PublishRequest) -> Volume | None:
        """Return the volume if it has files; adopt a mounted volume whose record was lost."""
        volume = self.volumes.get(request.volume_id)
        if volume is None and self.published.is_mounted(request.volume_id, request.target):
            volume = await self.restorer.adopt(request)
        if volume is not None and self.store.has_files(request.volume_id):
            return volume
        self.volumes.forget(request.volume_id)
        return None

    async def _publish_first(self, request: PublishRequest) -> None:
        spec, target = parse_declaration(request, self.kubelet_dir)
        obtained = await self.certificates.obtain(
            CertificateRequest(request.volume_id, request.pod, spec, request.token)
        )
        record = new_record(
            request, obtained.issued_at, obtained.renew_at, obtained.not_after, interim=obtained.interim
        )
        volume = Volume(record, spec, request.token)
        volume.root_sets = self.roots.accept_response(volume.trusted_names, obtained.root_sets)
        await in_thread(None, self._write_and_mount, volume, target, obtained)
        self.volumes.keep(volume)
        self.renewals.keep(volume)
        await self.roots.catch_up(volume)
        log.info(
            "volume published",
            names=str(spec.names),
            not_after=record.not_after,
            renew_at=record.renew_at,
            interim=record.interim,
        )

    def _write_and_mount(self, volume: Volume, target: Path, obtained: ObtainedCertificate) -> None:
        """Render and write the files and the record, then bind them to the target path. On failure undo everything."""
        volume_id, key, chain = volume.record.volume_id, obtained.key, obtained.verified.chain
        files_dir, roots = self.store.files_dir(volume_id), merge_roots(volume.root_sets, volume.trusted_names)
        try:
            self.store.create(volume_id)
            write_certificate(files_dir, key, chain, roots, volume.file_access, obtained.issued_at)
            self.store.write_record(volume.record)
            self.store.bind(volume_id, target)
        except BaseException:
            self.store.unbind(target)
            self.store.remove(volume_id)
            raise

    async def _republish(self, volume: Volume, request: PublishRequest) -> None:
        """Keep the newer token, and restore the mount if it was removed. Does no I/O if the volume is healthy."""
        if request.token is not None:
            if volume.token is None or request.token.claims.expires_at >= volume.token.claims.expires_at:
                volume.token = request.token
            self.renewals.token_received(volume)
        target = Path(request.target)
        if str(target) in volume.record.targets and self.store.is_healthy(volume.record.volume_id, target):
            return
        target = check_target(self.kubelet_dir, request.target, request.pod.uid)
        await in_thread(None, self.store.bind, volume.record.volume_id, target)
        if str(target) not in volume.record.targets:
            volume.record = replace(volume.record, targets=(*volume.record.targets, str(target)))
            await in_thread(None, self.store.write_record, volume.record)
        log.info("volume mounted again", target=str(target))
