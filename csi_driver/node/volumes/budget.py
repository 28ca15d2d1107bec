"""The memory budget of all volumes of the node, shared by their pods.

The kernel charges the files of all volumes to the driver's memory limit. Without a budget, one tenant could use up the limit,
and the driver would be OOM-killed for all pods.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from csi_driver.core.errors import CertmountError, Fault, Reason
from csi_driver.core.shares import FairShares
from csi_driver.host.volume_store import VOLUME_BYTES, VolumeStore
from csi_driver.node.pods import Pod

MEMORY_LIMIT = 192 * 1024 * 1024
"""The default of --memory-limit, in bytes, and the limit in the DaemonSet."""
DRIVER_MEMORY = 96 * 1024 * 1024
"""The part of the limit that volumes do not use: the driver without volumes, and what calls in progress need."""
_SMALLEST_LIMIT = 128 * 1024 * 1024
VOLUME_OVERHEAD_KIB = 48
"""For each volume: its tmpfs and inodes in the kernel, and its state in the driver; 26 KiB were measured before a renewal."""
_NEW_VOLUME_KIB = VOLUME_OVERHEAD_KIB + 32  # counted until the files are known: the smallest volumes have this size
_NAME_COPIES = 4
"""Of the names of a new volume: parsed, in the CSR, and in messages. The files of any layout need more of them later."""
_PAGE = 4096
_GENERATIONS = 3
"""A volume contains two generations. The third is a reserve for a longer chain, more roots and the next record."""
_RECORD_COPIES = 4  # in the driver: the attributes, and the values parsed from them


def volume_kib(record: int, files: Iterable[int]) -> int:
    """Return the memory of a volume in KiB. The record and the files of one generation are sizes in bytes."""
    pages = _GENERATIONS * sum(map(_pages, files)) + 2 * _pages(record)
    return VOLUME_OVERHEAD_KIB + (pages * _PAGE + _RECORD_COPIES * record) // 1024


class VolumeBudget:
    """What each volume uses. New volumes are refused if their owners' share is used up; existing ones never are."""

    def __init__(self, store: VolumeStore, memory_limit: int) -> None:
        if memory_limit < _SMALLEST_LIMIT:
            fault = Fault("--memory-limit", f"is {memory_limit} bytes", f"use at least {_SMALLEST_LIMIT}")
            raise CertmountError(Reason.INVALID_REQUEST, fault)
        self._store = store
        self.shares = FairShares("KiB for volumes on this node", (memory_limit - DRIVER_MEMORY) // 1024)
        self._volumes: dict[str, tuple[Sequence[str], int]] = {}  # the owners and the KiB of each volume

    def admit(self, volume_id: str, pod: Pod, names: int = 0) -> None:
        """Count a new volume before its certificate is requested; raises CertmountError ShareExceeded.

        ``names`` is the size of its names in bytes: variables can make short attributes long.
        """
        self._take(volume_id, pod, _NEW_VOLUME_KIB + _NAME_COPIES * names // 1024)

    def resize(self, volume_id: str, pod: Pod, record: int, files: Iterable[int]) -> None:
        """Count the files of a new volume before they are written.

        Raises CertmountError: ShareExceeded, or NoSpace if a renewal would fail because two generations do not fit.
        """
        files = list(files)
        if (needed := _PAGE * (2 * sum(map(_pages, files)) + 2 * _pages(record))) > VOLUME_BYTES:
            problem = f"needs {needed // 1024} KiB for its files and those of the next renewal; {VOLUME_BYTES // 1024} KiB fit"
            raise CertmountError(Reason.NO_SPACE, Fault("volume", problem, "use fewer federations or fewer files"))
        self._take(volume_id, pod, volume_kib(record, files))

    def measure(self, volume_id: str, pod: Pod | None) -> None:
        """Count a volume that exists, with its present files. A volume without a usable record has no known pod."""
        self.release(volume_id)
        owners, kib = pod.owners if pod is not None else (), volume_kib(*self._store.file_sizes(volume_id))
        self.shares.count(owners, kib)
        self._volumes[self._store.key(volume_id)] = owners, kib

    def release(self, volume_id: str) -> None:
        owners, kib = self._volumes.pop(self._store.key(volume_id), ((), 0))
        self.shares.give_back(owners, kib)

    def _take(self, volume_id: str, pod: Pod, kib: int) -> None:
        self.release(volume_id)
        self.shares.take(pod.owners, kib)
        self._volumes[self._store.key(volume_id)] = pod.owners, kib


def _pages(size: int) -> int:
    return -(-size // _PAGE)
