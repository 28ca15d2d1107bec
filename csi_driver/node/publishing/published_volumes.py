"""Inspect and unpublish volumes."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import structlog

from csi_driver.core.errors import CertmountError, Fault, Reason
from csi_driver.host.target_paths import may_be_target
from csi_driver.host.volume_store import VolumeStore
from csi_driver.node.renewal.renewals import Renewals
from csi_driver.node.threads import in_thread
from csi_driver.node.volumes.budget import VolumeBudget
from csi_driver.node.volumes.volume import Volume, VolumeProblem, VolumeTable

log = structlog.get_logger(__name__)

MAX_PROBLEMS = 16  # the kubelet ignores an answer with more


@dataclass(frozen=True, slots=True)
class PublishedVolumes:
    """The published volumes, as the kubelet's calls see them."""

    kubelet_dir: Path
    store: VolumeStore
    volumes: VolumeTable
    renewals: Renewals
    budget: VolumeBudget

    def is_mounted(self, volume_id: str, target: str) -> bool:
        possible = bool(volume_id) and may_be_target(self.kubelet_dir, target)
        return possible and self.store.is_healthy(volume_id, Path(target))

    def problem(self, volume_id: str, path: str) -> VolumeProblem | None:
        """Return what is wrong with the volume; ``path`` is its target path, or empty for all of them."""
        volume = self.volumes.get(volume_id)
        if volume is None or (path and path not in volume.record.targets):
            raise _not_published(volume_id, path)
        return self._damage(volume, (path,) if path else volume.record.targets) or self.renewals.problem(volume)

    def problems(self) -> list[VolumeProblem]:
        """Return the most frequent problems of the volumes, each with the number of affected volumes and an example."""
        by_reason: dict[str, list[VolumeProblem]] = {}
        volumes = list(self.volumes)
        for volume in volumes:
            if problem := self.problem(volume.record.volume_id, ""):
                by_reason.setdefault(problem.reason, []).append(problem)
        frequent = sorted(by_reason.items(), key=lambda item: (-len(item[1]), item[0]))
        return [
            VolumeProblem(reason, f"{len(found)} of {len(volumes)} volumes on this node, such as: {found[0].message}")
            for reason, found in frequent[:MAX_PROBLEMS]
        ]

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
            self.budget.release(volume_id)
            log.info("volume unpublished", volume=volume_id)

    def _find(self, volume_id: str, path: str) -> Volume:
        """Return the volume. If ``path`` is not empty, the volume must be mounted there."""
        volume = self.volumes.get(volume_id)
        if volume is None or (path and not (path in volume.record.targets and self.is_mounted(volume_id, path))):
            raise _not_published(volume_id, path)
        return volume

    def _damage(self, volume: Volume, targets: Sequence[str]) -> VolumeProblem | None:
        """Return that the files or a mount of the volume do not exist any more."""
        volume_id = volume.record.volume_id
        missing = [target for target in targets if not self.is_mounted(volume_id, target)]
        if not missing:
            return None
        lost = f"it is not mounted at {missing[0]}" if self.store.has_files(volume_id) else "its files do not exist"
        repair = "the driver repairs it at the kubelet's next publish call; then restart containers that see no files"
        return VolumeProblem("VolumeDamaged", f"the volume of pod {volume.pod} is damaged: {lost}; {repair}", True)


def _not_published(volume_id: str, path: str) -> CertmountError:
    location = f" at {path}" if path else ""
    return CertmountError(Reason.VOLUME_NOT_FOUND, Fault("volume_id", f"{volume_id} is not published{location}"))
