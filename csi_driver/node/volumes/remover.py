"""Remove the volumes of pods that no longer exist: the kubelet does not call NodeUnpublishVolume for them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import structlog

from csi_driver.core.errors import CertmountError
from csi_driver.core.renewal import retry_delay_s
from csi_driver.host.volume_record import VolumeRecord
from csi_driver.host.volume_store import VolumeStore
from csi_driver.node.scheduler import Scheduler
from csi_driver.node.threads import in_thread
from csi_driver.node.volumes.budget import VolumeBudget
from csi_driver.node.volumes.volume import Volume, VolumeTable

log = structlog.get_logger(__name__)


class VolumeRemover:
    """Removes volumes whose pods no longer exist. ``retries`` schedules the next attempt after a failure."""

    def __init__(
        self,
        store: VolumeStore,
        volumes: VolumeTable,
        budget: VolumeBudget,
        clock: Callable[[], float],
        rng: Callable[[], float],
    ) -> None:
        self._store = store
        self._budget = budget
        self._volumes = volumes
        self._clock = clock
        self._rng = rng
        self._failed: dict[str, tuple[VolumeRecord, int]] = {}
        self.retries = Scheduler(clock, self._retry)
        volumes.when_forgotten(self._forget)

    async def remove_if_pod_is_gone(self, volume: Volume) -> bool:
        """Remove the volume if its pod no longer exists. Return True in that case."""
        if await in_thread(None, self._store.pod_exists, volume.record.pod_uid):
            return False
        async with self._volumes.lock(volume.record.volume_id):
            if self._volumes.has(volume):
                await self.remove(volume.record)
        return True

    async def remove(self, record: VolumeRecord) -> None:
        """Remove a volume, and retry after a failure. Never raises. The caller holds the volume's lock."""
        self._volumes.forget(record.volume_id)
        await self._remove(record, failures=0)

    async def _retry(self, volume_id: str) -> None:
        async with self._volumes.lock(volume_id):
            if volume_id in self._failed:
                await self._remove(*self._failed[volume_id])

    async def _remove(self, record: VolumeRecord, failures: int) -> None:
        volume_id = record.volume_id
        try:
            for target in record.targets:
                await in_thread(None, self._store.unbind, Path(target))
            await in_thread(None, self._store.remove, volume_id)
        except CertmountError as error:
            delay = retry_delay_s(attempt=failures + 1, kind=error.reason.kind, jitter=self._rng())
            self._failed[volume_id] = record, failures + 1
            self.retries.schedule(volume_id, self._clock() + delay)
            log.warning(
                "removal of an orphaned volume failed",
                volume=volume_id,
                reason=error.reason.word,
                error=str(error),
                retry_in_s=round(delay, 1),
            )
        else:
            self._failed.pop(volume_id, None)
            self._budget.release(volume_id)
            pod = f"{record.pod_namespace}/{record.pod_name}"
            log.info("orphaned volume removed", volume=volume_id, pod=pod)

    def _forget(self, volume_id: str) -> None:
        self._failed.pop(volume_id, None)
        self.retries.cancel(volume_id)
