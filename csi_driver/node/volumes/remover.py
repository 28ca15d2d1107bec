"""Volumes whose pods have vanished: the kubelet will not ask for their removal any more, so it is the driver's to do."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import structlog

from csi_driver.core.errors import CertmountError
from csi_driver.core.renewal import retry_delay_s
from csi_driver.host.volume_record import VolumeRecord
from csi_driver.host.volume_store import VolumeStore
from csi_driver.node.renewal.rotation import Rotation
from csi_driver.node.threads import in_thread
from csi_driver.node.volumes.volume import Volume, VolumeTable

log = structlog.get_logger(__name__)


class VolumeRemover:
    """Removes the volumes of pods that are gone, and tries again where that fails; ``again`` is the clock that does so."""

    def __init__(
        self, store: VolumeStore, volumes: VolumeTable, clock: Callable[[], float], rng: Callable[[], float]
    ) -> None:
        self._store = store
        self._volumes = volumes
        self._clock = clock
        self._rng = rng
        self._left: dict[str, tuple[VolumeRecord, int]] = {}
        self.again = Rotation(clock, self._again)
        volumes.when_forgotten(self._forget)

    async def drop_if_gone(self, volume: Volume) -> bool:
        """Removes the volume if its pod is gone, and says whether it is."""
        if await in_thread(None, self._store.pod_exists, volume.record.pod_uid):
            return False
        async with self._volumes.lock(volume.record.volume_id):
            if self._volumes.has(volume):
                await self.drop(volume.record)
        return True

    async def drop(self, record: VolumeRecord) -> None:
        """Removes a volume, whose lock the caller holds or which nobody knows. Never raises: what fails is tried again."""
        self._volumes.forget(record.volume_id)
        await self._remove(record, attempt=1)

    async def _again(self, volume_id: str) -> None:
        async with self._volumes.lock(volume_id):
            if volume_id in self._left:
                record, attempt = self._left[volume_id]
                await self._remove(record, attempt + 1)

    async def _remove(self, record: VolumeRecord, attempt: int) -> None:
        volume_id = record.volume_id
        try:
            for target in record.targets:
                await in_thread(None, self._store.unbind, Path(target))
            await in_thread(None, self._store.remove, volume_id)
        except CertmountError as error:
            delay = retry_delay_s(attempt=attempt, kind=error.reason.kind, jitter=self._rng())
            self._left[volume_id] = record, attempt
            self.again.schedule(volume_id, self._clock() + delay)
            log.warning(
                "volume of a pod that is gone stays",
                volume=volume_id,
                reason=error.reason.word,
                error=str(error),
                retry_in_s=round(delay, 1),
            )
            return
        self._left.pop(volume_id, None)
        pod = f"{record.pod_namespace}/{record.pod_name}"
        log.info("dropped the volume of a pod that is gone", volume=volume_id, pod=pod)

    def _forget(self, volume_id: str) -> None:
        self._left.pop(volume_id, None)
        self.again.cancel(volume_id)
