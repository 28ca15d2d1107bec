"""The life of a volume: published once, looked after, removed. One call at a time for each volume."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import structlog

from csi_driver.core.attributes import parse_attributes
from csi_driver.core.certificates.root_sets import merge_roots
from csi_driver.core.errors import CertmountError, Fault, Reason
from csi_driver.core.renewal import plan_renewal
from csi_driver.host.target_paths import check_target, may_be_target
from csi_driver.host.volume_store import FilesystemUsage, VolumeStore
from csi_driver.node.issuance.enrolled import Enrolled
from csi_driver.node.issuance.enrolment import Enrolment
from csi_driver.node.publishing.publish_request import PublishRequest
from csi_driver.node.renewal.renewals import Renewals
from csi_driver.node.threads import in_thread
from csi_driver.node.trust.root_distribution import RootDistribution
from csi_driver.node.volumes.remover import VolumeRemover
from csi_driver.node.volumes.volume import Volume, VolumeTable, new_record
from csi_driver.node.volumes.volume_files import read_certificate, write_certificate
from csi_driver.telemetry.node_metrics import NodeMetrics

log = structlog.get_logger(__name__)


class Publisher:
    """What the kubelet asks for, and what an earlier process left."""

    def __init__(
        self,
        kubelet_dir: Path,
        store: VolumeStore,
        volumes: VolumeTable,
        enrolment: Enrolment,
        roots: RootDistribution,
        renewals: Renewals,
        removal: VolumeRemover,
        metrics: NodeMetrics,
        clock: Callable[[], float],
        rng: Callable[[], float],
    ) -> None:
        self._kubelet_dir = kubelet_dir
        self._store = store
        self._volumes = volumes
        self._enrolment = enrolment
        self._roots = roots
        self._renewals = renewals
        self._removal = removal
        self._metrics = metrics
        self._clock = clock
        self._rng = rng
        volumes.when_forgotten(metrics.forget)

    async def publish(self, request: PublishRequest) -> None:
        """Makes the volume's files appear at its target, or looks after a volume that is there already.

        Raises:
            CertmountError: on the first publish only; then nothing of the volume is left behind.
        """
        async with self._volumes.lock(request.volume_id):
            volume = self._volumes.get(request.volume_id)
            if volume is None and self.is_live(request.volume_id, request.target):
                volume = await self._adopt(request)
            if volume is not None and self._store.has_files(request.volume_id):
                await self._look_after(volume, request)
                return
            self._volumes.forget(request.volume_id)
            await self._publish_first(request)

    async def unpublish(self, volume_id: str, target: str) -> None:
        """Takes the volume away from its target, and its key from the node with the last target. Anything unknown is fine."""
        async with self._volumes.lock(volume_id):
            if may_be_target(self._kubelet_dir, target):
                await in_thread(None, self._store.unbind, Path(target))
            volume = self._volumes.get(volume_id)
            remaining = tuple(other for other in volume.record.targets if other != target) if volume else ()
            if volume is not None and remaining:
                volume.record = replace(volume.record, targets=remaining)
                await in_thread(None, self._store.write_record, volume.record)
                return
            self._volumes.forget(volume_id)
            await in_thread(None, self._store.remove, volume_id)
            log.info("unpublished", volume=volume_id)

    def is_live(self, volume_id: str, target: str) -> bool:
        """True when a pod has the volume's files before it at the target, whatever else is wrong."""
        there = bool(volume_id) and may_be_target(self._kubelet_dir, target)
        return there and self._store.is_healthy(volume_id, Path(target))

    def find(self, volume_id: str, path: str = "") -> Volume:
        """The volume, where a path is given published there; raises CertmountError VolumeNotFound."""
        volume = self._volumes.get(volume_id)
        if volume is None or (path and not (path in volume.record.targets and self.is_live(volume_id, path))):
            where = f" at {path}" if path else ""
            raise CertmountError(Reason.VOLUME_NOT_FOUND, Fault("volume_id", f"{volume_id} is not published{where}"))
        return volume

    def trouble(self, volume_id: str, path: str) -> tuple[str, str] | None:
        """What is wrong with a volume's certificate, as :meth:`Volume.trouble`; raises CertmountError VolumeNotFound."""
        return self._renewals.trouble(self.find(volume_id, path))

    def usage(self, volume_id: str) -> FilesystemUsage:
        """Space and inodes of the volume's own file system."""
        return self._store.usage(volume_id)

    async def restore(self) -> None:
        """Takes up the volumes that an earlier process left; re-issues nothing, forgets the pods that are gone."""
        scan = await in_thread(None, self._store.scan)
        unread: list[str] = []
        for record in scan.records:
            try:
                self._take_up(Volume(record, parse_attributes(record.attributes)))
            except CertmountError as error:
                unread.append(self._store.key(record.volume_id))
                log.error("volume not restored", volume=record.volume_id, error=str(error))  # noqa: TRY400  # expected kind
        for quarantined in scan.quarantined:
            self._metrics.record_quarantined()
            log.warning(
                "record quarantined; the volume stays as it is", volume=quarantined.key, error=quarantined.reason
            )
        self._roots.await_adoption([quarantined.key for quarantined in scan.quarantined] + unread)
        for record in scan.orphans:
            await self._removal.drop(record)
        gone = len(scan.orphans) + len(scan.dropped)
        log.info("restored", volumes=len(scan.records), quarantined=len(scan.quarantined), dropped=gone)

    async def _publish_first(self, request: PublishRequest) -> None:
        spec = parse_attributes(request.attributes)
        target = check_target(self._kubelet_dir, request.target, request.pod.uid)
        enrolled = await self._enrolment.obtain(request.volume_id, request.pod, spec, request.token, late_s=math.inf)
        record = new_record(
            request,
            str(target),
            enrolled.issued_at,
            enrolled.renew_at,
            enrolled.not_after,
            interim=enrolled.interim,
        )
        volume = Volume(record, spec, request.token)
        volume.trusts = self._roots.answered(volume.trusted, enrolled.trust)
        await in_thread(None, self._materialise, volume, target, enrolled)
        self._volumes.keep(volume)
        self._renewals.keep(volume)
        await self._roots.catch_up(volume)
        log.info(
            "published",
            names=str(spec.names),
            not_after=enrolled.not_after,
            renew_at=enrolled.renew_at,
            interim=enrolled.interim,
        )

    def _materialise(self, volume: Volume, target: Path, enrolled: Enrolled) -> None:
        """Everything of one publish that touches the host; undone as a whole where a part of it fails."""
        volume_id = volume.record.volume_id
        try:
            self._store.create(volume_id)
            files_dir = self._store.files_dir(volume_id)
            roots = merge_roots(volume.trusts, volume.trusted)
            write_certificate(files_dir, enrolled.key, enrolled.bundle.chain, roots, volume.readers, enrolled.issued_at)
            self._store.write_record(volume.record)
            self._store.bind(volume_id, target)
        except BaseException:
            self._store.unbind(target)
            self._store.remove(volume_id)
            raise

    async def _look_after(self, volume: Volume, request: PublishRequest) -> None:
        """A republish: the newer token is kept; the mount is put back where someone took it away."""
        if request.token is not None:
            if volume.token is None or request.token.claims.expires_at >= volume.token.claims.expires_at:
                volume.token = request.token
            self._renewals.token_came(volume)
        target = Path(request.target)
        if str(target) in volume.record.targets and self._store.is_healthy(volume.record.volume_id, target):
            return
        target = check_target(self._kubelet_dir, request.target, request.pod.uid)
        await in_thread(None, self._store.bind, volume.record.volume_id, target)
        if str(target) not in volume.record.targets:
            volume.record = replace(volume.record, targets=(*volume.record.targets, str(target)))
            await in_thread(None, self._store.write_record, volume.record)
        log.info("bound again", target=str(target))

    async def _adopt(self, request: PublishRequest) -> Volume:
        """Takes up a live volume whose record was lost: keeps its certificate where it fits, else renews it in place at once."""
        spec, now = parse_attributes(request.attributes), self._clock()
        try:
            files_dir = self._store.files_dir(request.volume_id)
            bundle = await in_thread(None, read_certificate, files_dir, spec, request.pod, now)
        except CertmountError as error:
            log.warning("adopted volume is renewed at once", reason=error.reason.word, error=str(error))
            record = new_record(request, request.target, now, now, now)
        else:
            issued_at = bundle.leaf.not_valid_before_utc.timestamp()
            not_after = bundle.leaf.not_valid_after_utc.timestamp()
            before = spec.renew_before.total_seconds() if spec.renew_before else None
            renew_at = plan_renewal(
                issued_at=issued_at,
                not_after=not_after,
                renew_before_s=before,
                renew_after_s=None,
                jitter=self._rng(),
            )
            record = new_record(request, request.target, issued_at, renew_at, not_after)
        volume = Volume(record, spec, request.token)
        await in_thread(None, self._store.write_record, record)
        self._take_up(volume)
        return volume

    def _take_up(self, volume: Volume) -> None:
        """Knows a volume that has its files already."""
        self._volumes.keep(volume)
        self._renewals.keep(volume)
        self._roots.take_up(volume)
