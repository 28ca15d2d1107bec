"""The life of a volume: published once, looked after, renewed in place, removed. One call at a time for each volume."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from weakref import WeakValueDictionary

import structlog
from cryptography import x509

from csi_driver.core.attributes import parse_attributes
from csi_driver.core.errors import CertmountError, Fault, Reason
from csi_driver.core.renewal import plan_renewal, retry_delay_s
from csi_driver.host.targets import check_target, may_be_target
from csi_driver.host.volumes import Usage, VolumeRecord, VolumeStore
from csi_driver.node.contents import read_certificate, replace_roots, write_certificate
from csi_driver.node.enrolment import Enrolled, Enrolment
from csi_driver.node.request import PublishRequest
from csi_driver.node.rotation import Rotation
from csi_driver.node.volume import Volume, new_record
from csi_driver.node.workers import in_thread
from csi_driver.telemetry.node_metrics import NodeMetrics

log = structlog.get_logger(__name__)

_AWAITING_TOKEN_S = 300.0
"""Kubelet's next look brings the token and brings the renewal forward; this is for the case that it never looks."""


class Publisher:
    """All volumes of this node. Every change of a volume happens under that volume's lock."""

    def __init__(
        self,
        kubelet_dir: Path,
        store: VolumeStore,
        enrolment: Enrolment,
        metrics: NodeMetrics,
        clock: Callable[[], float],
        chance: Callable[[], float],
    ) -> None:
        self._kubelet_dir = kubelet_dir
        self._store = store
        self._enrolment = enrolment
        self._metrics = metrics
        self._clock = clock
        self._chance = chance
        self._volumes: dict[str, Volume] = {}
        self._roots: tuple[x509.Certificate, ...] = ()
        self._locks: WeakValueDictionary[str, asyncio.Lock] = WeakValueDictionary()
        self.rotation = Rotation(clock, self.renew)

    # What kubelet asks for.

    async def publish(self, request: PublishRequest) -> None:
        """Makes the volume's files appear at its target, or looks after a volume that is there already.

        Raises:
            CertmountError: on the first publish only; then nothing of the volume is left behind.
        """
        async with self._lock(request.volume_id):
            volume = self._volumes.get(request.volume_id)
            if volume is None and self.is_live(request.volume_id, request.target):
                volume = await self._adopt(request)
            if volume is None or not self._store.has_files(request.volume_id):
                await self._publish_first(request)
            else:
                await self._look_after(volume, request)

    async def unpublish(self, volume_id: str, target: str) -> None:
        """Takes the volume away from its target, and its key from the node with the last target. Anything unknown is fine."""
        async with self._lock(volume_id):
            if may_be_target(self._kubelet_dir, target):
                await in_thread(None, self._store.unbind, Path(target))
            volume = self._volumes.get(volume_id)
            remaining = tuple(other for other in volume.record.targets if other != target) if volume else ()
            if volume is not None and remaining:
                volume.record = replace(volume.record, targets=remaining)
                await in_thread(None, self._store.write_record, volume.record)
                return
            self._forget(volume_id)
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
        return self.find(volume_id, path).trouble(self._clock())

    def usage(self, volume_id: str) -> Usage:
        """Space and inodes of the volume's own file system."""
        return self._store.usage(volume_id)

    # What the clock and the authority ask for.

    async def renew(self, volume_id: str) -> None:
        """Renews one volume in place. Never raises: what fails is reported and tried again."""
        volume = self._volumes.get(volume_id)
        if volume is None or volume.renewing:  # what is under way sets the next moment itself
            return
        volume.renewing = True
        try:
            with structlog.contextvars.bound_contextvars(volume=volume_id, pod=str(volume.pod)):
                if await in_thread(None, self._store.pod_exists, volume.record.pod_uid):
                    await self._renew(volume)
                else:
                    async with self._lock(volume_id):
                        if self._has(volume):
                            await self._drop(volume.record)
        finally:
            volume.renewing = False

    async def replace_roots(self, roots: Sequence[x509.Certificate]) -> None:
        """Brings other roots to every volume, without new keys or certificates."""
        self._roots = tuple(roots)
        for volume_id in list(self._volumes):
            async with self._lock(volume_id):
                if volume := self._volumes.get(volume_id):
                    await self._write_roots(volume)

    async def restore(self) -> None:
        """Takes up the volumes that an earlier process left; re-issues nothing, forgets the pods that are gone."""
        scan = await in_thread(None, self._store.scan)
        for record in scan.records:
            try:
                self._keep(Volume(record, parse_attributes(record.attributes)), record.renew_at)
            except CertmountError as error:
                log.error("volume not restored", volume=record.volume_id, error=str(error))  # noqa: TRY400  # expected kind
        for quarantined in scan.quarantined:
            self._metrics.record_quarantined()
            log.warning(
                "record quarantined; the volume stays as it is", volume=quarantined.key, error=quarantined.reason
            )
        for record in scan.orphans:
            await self._drop(record)
        gone = len(scan.orphans) + len(scan.dropped)
        log.info("restored", volumes=len(scan.records), quarantined=len(scan.quarantined), dropped=gone)

    # Steps.

    def _lock(self, volume_id: str) -> asyncio.Lock:
        return self._locks.setdefault(volume_id, asyncio.Lock())

    async def _publish_first(self, request: PublishRequest) -> None:
        spec = parse_attributes(request.attributes)
        target = check_target(self._kubelet_dir, request.target, request.pod.uid)
        known = self._roots
        enrolled = await self._enrolment.obtain(request.pod, spec, request.token)
        record = new_record(request, str(target), enrolled.issued_at, enrolled.renew_at, enrolled.not_after)
        volume = Volume(record, spec, request.token)
        await in_thread(None, self._materialise, volume, target, self._with_newest_roots(enrolled, known))
        self._keep(volume, enrolled.renew_at)
        if self._roots is not known:  # they may have come while it was written, when they did not reach it
            await self._write_roots(volume)
        log.info("published", names=str(spec.names), not_after=enrolled.not_after, renew_at=enrolled.renew_at)

    def _materialise(self, volume: Volume, target: Path, enrolled: Enrolled) -> None:
        """Everything of one publish that touches the host; undone as a whole where a part of it fails."""
        volume_id = volume.record.volume_id
        try:
            self._store.create(volume_id)
            files_dir = self._store.files_dir(volume_id)
            write_certificate(files_dir, enrolled.key, enrolled.bundle, volume.readers, enrolled.issued_at)
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
            if volume.failure is not None and volume.failure.reason in (Reason.TOKEN_MISSING, Reason.TOKEN_EXPIRED):
                volume.failure, volume.attempt = None, 0
                self._metrics.unhealthy(volume.record.volume_id, None)
                self.rotation.schedule(volume.record.volume_id, self._clock())
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
            bundle = await in_thread(None, read_certificate, files_dir, spec.names, request.pod, now)
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
                chance=self._chance(),
            )
            record = new_record(request, request.target, issued_at, renew_at, not_after)
        volume = Volume(record, spec, request.token)
        await in_thread(None, self._store.write_record, record)
        self._keep(volume, record.renew_at)
        return volume

    def _with_newest_roots(self, enrolled: Enrolled, known: Sequence[x509.Certificate]) -> Enrolled:
        """Where other roots than those ``known`` before came while the authority was asked, they win over its answer's."""
        if self._roots is known:
            return enrolled
        return replace(enrolled, bundle=replace(enrolled.bundle, roots=self._roots))

    async def _write_roots(self, volume: Volume) -> None:
        volume_id, readers = volume.record.volume_id, volume.readers
        files_dir = self._store.files_dir(volume_id)
        try:
            changed = await in_thread(None, replace_roots, files_dir, self._roots, readers, self._clock())
        except CertmountError as error:
            log.warning("roots not replaced", volume=volume_id, reason=error.reason.word, error=str(error))
            return
        if changed:
            log.info("roots replaced", volume=volume_id, pod=str(volume.pod))

    async def _renew(self, volume: Volume) -> None:
        """Obtains a certificate, then writes it. No lock is held meanwhile: kubelet's calls don't wait for the authority."""
        try:
            known = self._roots
            enrolled = await self._enrolment.obtain(volume.pod, volume.spec, volume.token)
            async with self._lock(volume.record.volume_id):
                if self._has(volume):
                    await self._write_renewed(volume, self._with_newest_roots(enrolled, known))
        except CertmountError as error:
            self._renewal_failed(volume, error)
        except Exception as error:  # noqa: BLE001  # one volume's defect must not end the clock of all
            defect = f"a defect in certmount ({type(error).__name__})"
            self._renewal_failed(volume, CertmountError(Reason.INTERNAL, defect))

    async def _write_renewed(self, volume: Volume, enrolled: Enrolled) -> None:
        record = replace(
            volume.record, issued_at=enrolled.issued_at, renew_at=enrolled.renew_at, not_after=enrolled.not_after
        )
        files_dir = self._store.files_dir(record.volume_id)
        await in_thread(
            None, write_certificate, files_dir, enrolled.key, enrolled.bundle, volume.readers, enrolled.issued_at
        )
        volume.record, volume.failure, volume.attempt = record, None, 0
        self._keep(volume, enrolled.renew_at)
        self._metrics.renewed()
        await in_thread(None, self._store.write_record, record)
        log.info("renewed", not_after=enrolled.not_after, renew_at=enrolled.renew_at)

    def _renewal_failed(self, volume: Volume, error: CertmountError) -> None:
        if not self._has(volume):
            return
        volume.failure, volume.attempt = error, volume.attempt + 1
        delay = retry_delay_s(attempt=volume.attempt, kind=error.reason.kind, chance=self._chance())
        if error.reason in (Reason.TOKEN_MISSING, Reason.TOKEN_EXPIRED):
            delay = _AWAITING_TOKEN_S
        self.rotation.schedule(volume.record.volume_id, self._clock() + delay)
        self._metrics.renewal_failed(error.reason)
        self._metrics.unhealthy(volume.record.volume_id, error.reason)
        log.warning(
            "not renewed",
            reason=error.reason.word,
            error=str(error),
            attempt=volume.attempt,
            retry_in_s=round(delay, 1),
        )

    def _has(self, volume: Volume) -> bool:
        """False once it was unpublished, also when it has been published anew."""
        return self._volumes.get(volume.record.volume_id) is volume

    def _keep(self, volume: Volume, renew_at: float) -> None:
        volume_id = volume.record.volume_id
        self._volumes[volume_id] = volume
        self.rotation.schedule(volume_id, renew_at)
        self._metrics.keep(volume_id, volume.record.not_after)
        self._metrics.unhealthy(volume_id, None)

    def _forget(self, volume_id: str) -> None:
        self._volumes.pop(volume_id, None)
        self.rotation.cancel(volume_id)
        self._metrics.forget(volume_id)

    async def _drop(self, record: VolumeRecord) -> None:
        """Removes the volume of a pod that no longer exists; kubelet will not ask for it any more."""
        self._forget(record.volume_id)
        try:
            for target in record.targets:
                await in_thread(None, self._store.unbind, Path(target))
            await in_thread(None, self._store.remove, record.volume_id)
        except CertmountError as error:
            log.warning("volume of a pod that is gone stays", volume=record.volume_id, error=str(error))
            return
        log.info(
            "dropped the volume of a pod that is gone",
            volume=record.volume_id,
            pod=f"{record.pod_namespace}/{record.pod_name}",
        )
