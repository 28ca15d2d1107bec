"""Inspect and unpublish volumes."""

from __future__ import annotations

import os
from dataclasses import dataclass, replace
from pathlib import Path

import structlog

from csi_driver.core.errors import CertmountError, Fault, Reason
from csi_driver.host.target_paths import may_be_target
from csi_driver.host.volume_store import VolumeStore
from csi_driver.node.renewal.renewals import Renewals
from csi_driver.node.threads import in_thread
from csi_driver.node.volumes.volume import Volume, VolumeProblem, VolumeTable

log = structlog.get_logger(__name__)


@dataclass(frozen=True, slots=True)
class PublishedVolumes:
    """The published volumes, as the kubelet's calls see them."""

    kubelet_dir: Path
    store: VolumeStore
    volumes: VolumeTable
    renewals: Renewals

    def is_mounted(self, volume_id: str, target: str) -> bool:
        possible = bool(volume_id) and may_be_target(self.kubelet_dir, target)
        return possible and self.store.is_healthy(volume_id, Path(target))

    def problem(self, volume_id: str, path: str) -> VolumeProblem | None:
        return self.renewals.problem(self._find(volume_id, path))

    def usage(self, volume_id: str, path: str) -> os.statvfs_result:
        self._find(volume_id, path)
        return self.store.usage(volume_id)

    async def unpublish(self, volume_id: str, target: str) -> None:
        """Unmount the volume at the target path. Remove the volume and its key after its last target path."""
        async with self.volumes.lock(volume_id):
            if may_be_target(self.kubelet_dir, target):
                await in_thread(None, self.store.unbind, Path(target))
            volume = self.volumes.get(volume_id)
            remaining = tuple(other for other in volume.record.targets if other != target) if volume else ()
            if volume is not None and remaining:
                volume.record = replace(volume.record, targets=remaining)
                await in_thread(None, self.store.write_record, volume.record)
                return
            self.volumes.forget(volume_id)
            await in_thread(None, self.store.remove, volume_id)
            log.info("volume unpublished", volume=volume_id)

    def _find(self, volume_id: str, path: str) -> Volume:
        """Return the volume. If ``path`` is not empty, the volume must be mounted there."""
        volume = self.volumes.get(volume_id)
        if volume is None or (path and not (path in volume.record.targets and self.is_mounted(volume_id, path))):
            location = f" at {path}" if path else ""
            problem = f"{volume_id} is not published{location}"
            raise CertmountError(Reason.VOLUME_NOT_FOUND, Fault("volume_id", problem))
        return volume
