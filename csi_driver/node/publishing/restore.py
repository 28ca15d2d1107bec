"""Restore the volumes of an earlier driver process, without new certificates."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import structlog

from csi_driver.core.attributes import CertificateSpec, parse_attributes
from csi_driver.core.errors import CertmountError
from csi_driver.core.renewal import plan_renewal
from csi_driver.host.generations import replaced_at
from csi_driver.host.volume_record import VolumeRecord
from csi_driver.host.volume_store import VolumeStore
from csi_driver.node.publishing.publish_request import PublishRequest
from csi_driver.node.renewal.renewals import Renewals
from csi_driver.node.threads import in_thread
from csi_driver.node.trust.root_distribution import RootDistribution
from csi_driver.node.volumes.budget import VolumeBudget
from csi_driver.node.volumes.remover import VolumeRemover
from csi_driver.node.volumes.volume import Volume, VolumeTable, pod_of
from csi_driver.node.volumes.volume_files import read_certificate
from csi_driver.telemetry.node_metrics import NodeMetrics

log = structlog.get_logger(__name__)

_SIGNAL_WINDOW_S = 600.0
"""The longest time between the last signals of a driver process and the start of the next, for example for an update."""


@dataclass(frozen=True, slots=True)
class VolumeRestorer:
    """Restores volumes from their records at start, and from their files if the record was lost."""

    node_name: str
    store: VolumeStore
    volumes: VolumeTable
    roots: RootDistribution
    renewals: Renewals
    remover: VolumeRemover
    budget: VolumeBudget
    metrics: NodeMetrics
    clock: Callable[[], float]
    rng: Callable[[], float]

    async def restore(self) -> None:
        """Restore all volumes that have a record, and remove those whose pods no longer exist."""
        scan = await in_thread(None, self.store.scan)
        unusable: list[str] = []
        for record in scan.records:
            try:
                self._keep(restored_volume(record, self.node_name))
            except CertmountError as error:
                unusable.append(self.store.key(record.volume_id))
                self.metrics.record_quarantined()
                self.budget.measure(record.volume_id, None)
                pod = str(pod_of(record))
                log.error("volume not restored", volume=record.volume_id, pod=pod, error=str(error))  # noqa: TRY400
        for quarantined in scan.quarantined:
            self.metrics.record_quarantined()
            self.budget.measure(quarantined.key, None)
            log.warning(
                "record quarantined; the volume keeps its files", volume=quarantined.key, error=quarantined.reason
            )
        self.roots.await_adoption([quarantined.key for quarantined in scan.quarantined] + unusable)
        for record in scan.orphans:
            self.budget.measure(record.volume_id, None)
            await self.remover.remove(record)
        removed = len(scan.orphans) + len(scan.dropped)
        log.info("volumes restored", volumes=len(scan.records), quarantined=len(scan.quarantined), removed=removed)

    async def adopt(self, request: PublishRequest) -> Volume:
        """Restore a mounted volume whose record was lost. Renew it immediately if its certificate does not match."""
        spec, now = parse_attributes(request.attributes, request.variables), self.clock()
        record = new_record(request, now) if spec.root_only else await self._record_of_certificate(request, spec, now)
        volume = Volume(record, spec, request.token)
        await in_thread(None, self.store.write_record, record)
        self._keep(volume)
        return volume

    async def _record_of_certificate(self, request: PublishRequest, spec: CertificateSpec, now: float) -> VolumeRecord:
        try:
            files_dir = self.store.files_dir(request.volume_id)
            leaf = (await in_thread(None, read_certificate, files_dir, spec, request.pod, now)).leaf
        except CertmountError as error:
            log.warning("adopted volume will be renewed now", reason=error.reason.word, error=str(error))
            return new_record(request, now, now, now)
        issued_at, not_after = leaf.not_valid_before_utc.timestamp(), leaf.not_valid_after_utc.timestamp()
        renew_at = plan_renewal(
            issued_at=issued_at,
            not_after=not_after,
            renew_before=spec.renew_before,
            renew_after_s=None,
            jitter=self.rng(),
        )
        return new_record(request, issued_at, renew_at, not_after)

    def _keep(self, volume: Volume) -> None:
        self.volumes.keep(volume)
        self.renewals.keep(volume)
        self.budget.measure(volume.record.volume_id, volume.pod)
        self.roots.check_restored(volume)
        # The earlier process may have ended before it signalled the pod. A second signal is harmless.
        replaced = replaced_at(self.store.files_dir(volume.record.volume_id)) if volume.spec.reload else None
        if replaced is not None and self.clock() - replaced < _SIGNAL_WINDOW_S:
            self.volumes.files_replaced(volume)


def restored_volume(record: VolumeRecord, node_name: str) -> Volume:
    """Return the volume of a record, whose variables have the values that they had when it was published."""
    return Volume(record, parse_attributes(record.attributes, pod_of(record).variables(node_name)))


def new_record(
    request: PublishRequest,
    issued_at: float,
    renew_at: float = math.inf,
    not_after: float = math.inf,
    *,
    interim: bool = False,
) -> VolumeRecord:
    """Return the record of a volume that is mounted at the request's target path. Times are unix seconds.

    Without a certificate, ``issued_at`` is the time when the files were written.
    """
    return VolumeRecord(
        volume_id=request.volume_id,
        pod_namespace=request.pod.namespace,
        pod_name=request.pod.name,
        pod_uid=request.pod.uid,
        service_account=request.pod.service_account,
        attributes=dict(request.attributes),
        mount_group=request.mount_group,
        targets=(request.target,),
        issued_at=issued_at,
        renew_at=renew_at,
        not_after=not_after,
        interim=interim,
    )
