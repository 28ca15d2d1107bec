"""The folder of every volume: one tmpfs with the record and the files, bound read-only at the pod's target.

::

    <root>/<key>/             the volume's own tmpfs, 0700
        record.json           what the driver must know after a restart
        files/                0755, what pods see; see :mod:`csi_driver.host.generations`

The record lies in the tmpfs and so shares its fate: a reboot drops both, and no disk is ever written to.
"""

from __future__ import annotations

import errno
import hashlib
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from csi_driver.core.errors import CertmountError, Fault, Reason
from csi_driver.host.directories import remove_folder
from csi_driver.host.generations import DATA, erase_files
from csi_driver.host.mounts import Mounts
from csi_driver.host.os_errors import translate_os_errors
from csi_driver.host.volume_record import VolumeRecord

# Two generations of an RSA-4096 chain take about 60 KiB in pages of 4 KiB, and 12 inodes.
VOLUME_BYTES: Final = 1 << 20
VOLUME_INODES: Final = 128

_RECORD: Final = "record.json"
_RECORD_TMP: Final = "record.json.tmp"
_CORRUPT: Final = "record.json.corrupt"
_FILES: Final = "files"
# How rmdir(2) fails on nothing, on no folder, on content, and on a stranger's mount.
_NOT_OURS: Final = {errno.ENOENT, errno.ENOTDIR, errno.ENOTEMPTY, errno.EBUSY}
_PLAIN_KEY: Final = re.compile(r"[A-Za-z0-9_-][A-Za-z0-9_.-]{0,127}")


@dataclass(frozen=True, slots=True)
class FilesystemUsage:
    """What a volume's file system holds, in bytes and inodes."""

    total_bytes: int
    used_bytes: int
    available_bytes: int
    total_inodes: int
    used_inodes: int
    available_inodes: int


@dataclass(frozen=True, slots=True)
class QuarantinedVolume:
    """A folder that is left as it is, as its record can't be used or the folder can't be removed; and why."""

    key: str
    reason: str


@dataclass(frozen=True, slots=True)
class VolumeScan:
    """What a start finds. A volume is in one of the four, and only those in ``dropped`` were removed by the scan."""

    records: tuple[VolumeRecord, ...]  # mounted, and the pod exists
    orphans: tuple[VolumeRecord, ...]  # mounted, but the pod's folder is gone
    quarantined: tuple[QuarantinedVolume, ...]  # mounted and perhaps shown to a pod, but without a usable record
    dropped: tuple[str, ...]  # keys: not mounted since a reboot, or mounted and never shown to a pod


class VolumeStore:
    """All volumes of one driver. One caller per volume at a time; volumes do not disturb each other."""

    def __init__(self, root: Path, kubelet_dir: Path, mounts: Mounts) -> None:
        self._root = root
        self._kubelet_dir = kubelet_dir
        self._mounts = mounts

    def key(self, volume_id: str) -> str:
        """The folder's name: the id itself where it is a safe file name, else its SHA-256 in hex."""
        return volume_id if _PLAIN_KEY.fullmatch(volume_id) else hashlib.sha256(volume_id.encode()).hexdigest()

    def files_dir(self, volume_id: str) -> Path:
        return self._folder(volume_id) / _FILES

    def create(self, volume_id: str) -> None:
        """Makes the volume's folder with its tmpfs and an empty files folder; what is there already is used.

        Raises CertmountError: MOUNT_FAILED, NO_SPACE, INVALID_TARGET_PATH.
        """
        folder = self._folder(volume_id)
        with translate_os_errors("volume", "make the volume's folder", folder):
            made = self._make_folder(folder)
            if made or folder not in self._mounts.survey([folder]):
                if not made:  # a leftover, and not of this boot
                    remove_folder(folder)
                    self._make_folder(folder)
                self._mount(folder)
            files = folder / _FILES
            with suppress(FileExistsError):
                files.mkdir()
            files.chmod(0o755)

    def write_record(self, record: VolumeRecord) -> None:
        """Replaces the record at once (0600). Raises CertmountError: NO_SPACE, MOUNT_FAILED."""
        folder = self._folder(record.volume_id)
        temporary = folder / _RECORD_TMP
        with translate_os_errors("volume", "write the record in", folder):
            with open(temporary, "wb", opener=lambda path, flags: os.open(path, flags, 0o600)) as file:
                file.write(record.to_json())
            temporary.replace(folder / _RECORD)

    def read_record(self, volume_id: str) -> VolumeRecord:
        """The volume's record. CertmountError VOLUME_NOT_FOUND when there is none, ValueError when it is damaged."""
        try:
            return self._read_record(self._folder(volume_id))
        except (FileNotFoundError, NotADirectoryError) as error:
            raise _no_volume(volume_id) from error

    def bind(self, volume_id: str, target: Path) -> None:
        """Shows the files at ``target``, whose folder is made; one that is there is mounted over, never twice.

        Raises CertmountError: INVALID_TARGET_PATH, MOUNT_FAILED, NO_SPACE; INTERNAL for a volume without files.
        """
        files = self.files_dir(volume_id)
        if not self.has_files(volume_id):
            raise CertmountError(Reason.INTERNAL, Fault("volume", "is mounted before it has files"))
        if self._mounts.is_bound(files, target):
            return
        made = self._make_target(target)
        try:
            self._mounts.bind_read_only(files, target)
        except BaseException:
            if made:
                with suppress(OSError):  # the first failure is the one to tell
                    target.rmdir()
            raise

    def is_healthy(self, volume_id: str, target: Path) -> bool:
        """True when ``target`` shows the volume's files read-only. A few stat calls: for every republish."""
        return self._mounts.is_bound(self.files_dir(volume_id), target) and self.has_files(volume_id)

    def has_files(self, volume_id: str) -> bool:
        """True when a generation of files lies in the volume, wherever it is shown."""
        return (self.files_dir(volume_id) / DATA).is_dir()

    def unbind(self, target: Path) -> None:
        """Unmounts ``target`` and removes its folder; nothing there is no error, and what is not ours stays.

        Raises CertmountError MOUNT_FAILED.
        """
        self._mounts.unmount(target)
        with translate_os_errors("target_path", "remove", target):
            try:
                target.rmdir()
            except OSError as error:
                if error.errno not in _NOT_OURS:
                    raise

    def remove(self, volume_id: str) -> None:
        """Erases the files, unmounts the tmpfs, removes its folder. CertmountError MOUNT_FAILED; a missing one is none.

        The files are erased as a copy of the mount may live on in a namespace that nobody thinks of.
        """
        folder = self._folder(volume_id)
        with translate_os_errors("volume", "remove", folder), _held(folder / _FILES) as files:
            self._drop(folder)
            if files is not None:
                erase_files(files)

    def scan(self) -> VolumeScan:
        """Sorts all volumes, at start. One bad volume is never fatal. CertmountError when the root can't be read."""
        with translate_os_errors("volume", "read", self._root):
            self._root.mkdir(mode=0o700, parents=True, exist_ok=True)
            self._root.chmod(0o700)
            with os.scandir(self._root) as entries:
                folders = sorted(Path(entry.path) for entry in entries if entry.is_dir(follow_symlinks=False))
            mounted = self._mounts.survey(folders)
        records, orphans, quarantined, dropped = [], [], [], []
        for folder in folders:
            try:
                record = self._usable_record(folder, shown=mounted[folder]) if folder in mounted else None
                if record is None:
                    self._drop(folder)
                    dropped.append(folder.name)
                elif self.pod_exists(record.pod_uid):
                    records.append(record)
                else:
                    orphans.append(record)
            except (OSError, ValueError, CertmountError) as error:
                quarantined.append(QuarantinedVolume(folder.name, str(error)))
        return VolumeScan(tuple(records), tuple(orphans), tuple(quarantined), tuple(dropped))

    def usage(self, volume_id: str) -> FilesystemUsage:
        """What the volume's file system holds. CertmountError VOLUME_NOT_FOUND."""
        try:
            found = os.statvfs(self.files_dir(volume_id))
        except (FileNotFoundError, NotADirectoryError) as error:
            raise _no_volume(volume_id) from error
        return FilesystemUsage(
            total_bytes=found.f_blocks * found.f_frsize,
            used_bytes=(found.f_blocks - found.f_bfree) * found.f_frsize,
            available_bytes=found.f_bavail * found.f_frsize,
            total_inodes=found.f_files,
            used_inodes=found.f_files - found.f_ffree,
            available_inodes=found.f_favail,
        )

    def pod_exists(self, pod_uid: str) -> bool:
        """False only when the kubelet's folder of pods is there and the pod's is not in it: in doubt, a pod lives."""
        pods = self._kubelet_dir / "pods"
        return os.path.lexists(pods / pod_uid) or not pods.is_dir()

    def _folder(self, volume_id: str) -> Path:
        return self._root / self.key(volume_id)

    def _make_folder(self, folder: Path) -> bool:
        """False when it is there already."""
        try:
            folder.mkdir(mode=0o700)
        except FileNotFoundError:
            self._root.mkdir(mode=0o700, parents=True, exist_ok=True)
            folder.mkdir(mode=0o700)
        except FileExistsError:
            return False
        return True

    def _mount(self, folder: Path) -> None:
        try:
            self._mounts.make_tmpfs(folder, VOLUME_BYTES, VOLUME_INODES)
        except BaseException:
            with suppress(OSError):  # the first failure is the one to tell
                folder.rmdir()
            raise

    def _make_target(self, target: Path) -> bool:
        """Makes the target's folder, 0750 as the kubelet's are; True when it was not there."""
        with translate_os_errors("target_path", "make the folder", target):
            made = not os.path.lexists(target)
            if not made:
                self._mounts.unmount(target)
            with suppress(FileExistsError):
                target.mkdir()
                target.chmod(0o750)
        if target.is_symlink() or not target.is_dir():
            problem = f"something other than a folder is at {target}"
            raise CertmountError(Reason.INVALID_TARGET_PATH, Fault("target_path", problem, "remove it from the node"))
        return made

    def _drop(self, folder: Path) -> None:
        self._mounts.unmount(folder)
        with translate_os_errors("volume", "remove", folder):
            remove_folder(folder)

    def _usable_record(self, folder: Path, *, shown: bool) -> VolumeRecord | None:
        """A mounted volume's record. ValueError when it has none, None when no pod can see its files either."""
        try:
            return self._read_record(folder)
        except (OSError, ValueError) as error:
            if not shown:
                return None
            with suppress(FileNotFoundError):
                (folder / _RECORD).replace(folder / _CORRUPT)
            problem = f"there is no {_RECORD}" if isinstance(error, FileNotFoundError) else f"{_RECORD}: {error}"
            raise ValueError(problem) from error

    def _read_record(self, folder: Path) -> VolumeRecord:
        with (folder / _RECORD).open("rb") as file:
            record = VolumeRecord.from_json(file.read(VOLUME_BYTES))
        if self.key(record.volume_id) != folder.name:
            raise ValueError(f"volume_id: {record.volume_id!r} is another volume's")
        return record


def _no_volume(volume_id: str) -> CertmountError:
    return CertmountError(Reason.VOLUME_NOT_FOUND, Fault("volume_id", f"there is no volume {volume_id!r} on this node"))


@contextmanager
def _held(folder: Path) -> Iterator[int | None]:
    """An open folder, which stays readable when its file system is unmounted meanwhile; None when it is not there."""
    try:
        descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
    except (FileNotFoundError, NotADirectoryError):
        yield None
        return
    try:
        yield descriptor
    finally:
        os.close(descriptor)
