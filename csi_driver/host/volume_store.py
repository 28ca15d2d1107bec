"""The directories of all volumes: a tmpfs for each, with a record and the files, and a read-only bind at the target path.

::

    <root>/<key>/             the volume's own tmpfs, 0700
        record.json           what the driver needs after a restart
        private/              0700, the current key, certificates and roots, for the driver
        files/                0755, what pods see; see :mod:`csi_driver.host.generations`

The record is in the tmpfs too: a reboot removes both, and nothing is written to a disk.
"""

from __future__ import annotations

import errno
import hashlib
import os
import re
import stat
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from csi_driver.core.errors import CertmountError, Fault, Reason
from csi_driver.host.atomic_write import replace_file
from csi_driver.host.directories import open_descriptor, remove_directory
from csi_driver.host.generations import DATA, PRIVATE, erase_files
from csi_driver.host.mounts import Mounts
from csi_driver.host.os_errors import translate_os_errors
from csi_driver.host.volume_record import MAX_RECORD_BYTES, VolumeRecord

# Two generations of an RSA-4096 chain use about 60 KiB in pages of 4 KiB, and 12 inodes.
VOLUME_BYTES: Final = 1 << 20
VOLUME_INODES: Final = 128

_RECORD: Final = "record.json"
_CORRUPT: Final = "record.json.corrupt"
_FILES: Final = "files"
# The errors of rmdir(2) for a missing directory, a file, a directory with content, and a foreign mount.
_NOT_OURS: Final = {errno.ENOENT, errno.ENOTDIR, errno.ENOTEMPTY, errno.EBUSY}
# The errors of stat(2) and open(2) that mean that a path does not exist. All others leave it open.
_ABSENT: Final = {errno.ENOENT, errno.ENOTDIR, errno.ELOOP}
_PLAIN_KEY: Final = re.compile(r"[A-Za-z0-9_-][A-Za-z0-9_.-]{0,127}")


@dataclass(frozen=True, slots=True)
class QuarantinedVolume:
    """A volume directory that the driver leaves unchanged, and the reason: an unusable record or a failed removal."""

    key: str
    reason: str


@dataclass(frozen=True, slots=True)
class VolumeScan:
    """All volumes at start, each in one of four groups. The scan has removed only those in ``dropped``."""

    records: tuple[VolumeRecord, ...]  # mounted, and the pod exists
    orphans: tuple[VolumeRecord, ...]  # mounted, but the pod's directory no longer exists
    quarantined: tuple[QuarantinedVolume, ...]  # mounted and possibly bound, but without a usable record
    dropped: tuple[str, ...]  # keys of volumes that a reboot unmounted, or that were never bound


class VolumeStore:
    """All volume directories of a driver. Supports one caller per volume at a time."""

    def __init__(self, root: Path, kubelet_dir: Path, mounts: Mounts) -> None:
        self._root = root
        self._kubelet_dir = kubelet_dir
        self._mounts = mounts

    def key(self, volume_id: str) -> str:
        """Return the name of the volume directory: the ID if it is a safe file name, else its SHA-256 in hex."""
        return volume_id if _PLAIN_KEY.fullmatch(volume_id) else hashlib.sha256(volume_id.encode()).hexdigest()

    def files_dir(self, volume_id: str) -> Path:
        return self._directory(volume_id) / _FILES

    def create(self, volume_id: str) -> bool:
        """Create the volume directory with its tmpfs and an empty files directory. Return False if it exists.

        Raises CertmountError: MOUNT_FAILED, NO_SPACE, INVALID_TARGET_PATH.
        """
        directory = self._directory(volume_id)
        with translate_os_errors("volume", "create the volume directory", directory):
            new = self._make_directory(directory)
            if not new and directory not in self._mounts.survey([directory]):
                remove_directory(directory)  # left behind before a reboot
                new = self._make_directory(directory)
            if new:
                self._mount(directory)
            for name, mode in ((_FILES, 0o755), (PRIVATE, 0o700)):
                with suppress(FileExistsError):
                    (directory / name).mkdir()
                (directory / name).chmod(mode)
        return new

    def write_record(self, record: VolumeRecord) -> None:
        """Replace the record atomically (mode 0600). Raises CertmountError: NO_SPACE, MOUNT_FAILED."""
        directory = self._directory(record.volume_id)
        with translate_os_errors("volume", "write the record in", directory):
            replace_file(directory / _RECORD, record.to_json(), mode=0o600, durable=False)

    def bind(self, volume_id: str, target: Path) -> None:
        """Bind the files at ``target`` and create its directory. Do nothing if they are bound already.

        Raises CertmountError: INVALID_TARGET_PATH, MOUNT_FAILED, NO_SPACE; INTERNAL if the volume has no files.
        """
        files = self.files_dir(volume_id)
        if not self.has_files(volume_id):
            raise CertmountError(Reason.INTERNAL, Fault("volume", "cannot be mounted before it has files"))
        if self._mounts.is_bound(files, target):
            return
        created = self._make_target(target)
        try:
            self._mounts.bind_read_only(files, target)
        except BaseException:
            if created:
                with suppress(OSError):  # report the first failure
                    target.rmdir()
            raise

    def is_healthy(self, volume_id: str, target: Path) -> bool:
        """Return True if ``target`` shows the volume's files read-only. Only a few stat calls: every republish calls it."""
        return self._mounts.is_bound(self.files_dir(volume_id), target) and self.has_files(volume_id)

    def has_files(self, volume_id: str) -> bool:
        """Return True if the volume has a generation of files, bound or not. If in doubt, it has."""
        return _may_be_directory(self.files_dir(volume_id) / DATA)

    def unbind(self, target: Path) -> None:
        """Unmount ``target`` and remove its directory. Ignore a missing target, and do not touch foreign mounts and files.

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
        """Erase the files, unmount the tmpfs and remove its directory. Raises CertmountError MOUNT_FAILED."""
        self._erase(self._directory(volume_id))

    def scan(self) -> VolumeScan:
        """Find and classify all volumes at start. Raises CertmountError only if the root cannot be read."""
        with translate_os_errors("volume", "read", self._root):
            self._root.mkdir(mode=0o700, parents=True, exist_ok=True)
            self._root.chmod(0o700)
            with os.scandir(self._root) as entries:
                directories = sorted(Path(entry.path) for entry in entries if entry.is_dir(follow_symlinks=False))
            mounted = self._mounts.survey(directories)
        records, orphans, quarantined, dropped = [], [], [], []
        for directory in directories:
            try:
                record = self._usable_record(directory, bound=mounted[directory]) if directory in mounted else None
                if record is None:
                    self._erase(directory)
                    dropped.append(directory.name)
                elif self.pod_exists(record.pod_uid):
                    records.append(record)
                else:
                    orphans.append(record)
            except (OSError, ValueError, CertmountError) as error:
                quarantined.append(QuarantinedVolume(directory.name, str(error)))
        return VolumeScan(tuple(records), tuple(orphans), tuple(quarantined), tuple(dropped))

    def usage(self, volume_id: str) -> os.statvfs_result:
        """Return the use of the volume's file system. Raises CertmountError VOLUME_NOT_FOUND."""
        try:
            return os.statvfs(self.files_dir(volume_id))
        except (FileNotFoundError, NotADirectoryError) as error:
            fault = Fault("volume_id", f"there is no volume {volume_id!r} on this node")
            raise CertmountError(Reason.VOLUME_NOT_FOUND, fault) from error

    def file_sizes(self, volume_id: str) -> tuple[int, list[int]]:
        """Return the sizes of the record and of the files of the current generation in bytes, with the private one; 0 and none if they are missing."""
        directory, sizes, record = self._directory(volume_id), list[int](), 0
        with suppress(OSError):
            record = (directory / _RECORD).stat().st_size
        for name in (_FILES + "/" + DATA, PRIVATE):
            with suppress(OSError), os.scandir(directory / name) as entries:
                sizes.extend(entry.stat().st_size for entry in entries)
        return record, sizes

    def pod_exists(self, pod_uid: str) -> bool:
        """Return False if the kubelet's pods directory exists but the pod's does not. If in doubt, the pod exists."""
        pods = self._kubelet_dir / "pods"
        try:
            os.lstat(pods / pod_uid)
        except FileNotFoundError:
            with suppress(OSError):
                return not stat.S_ISDIR(pods.stat().st_mode)
        except (OSError, ValueError):  # not os.path.lexists, which returns False for these
            return True
        return True

    def _directory(self, volume_id: str) -> Path:
        return self._root / self.key(volume_id)

    def _make_directory(self, directory: Path) -> bool:
        """Create the directory. Return False if it exists."""
        try:
            directory.mkdir(mode=0o700)
        except FileNotFoundError:
            self._root.mkdir(mode=0o700, parents=True, exist_ok=True)
            directory.mkdir(mode=0o700)
        except FileExistsError:
            return False
        return True

    def _mount(self, directory: Path) -> None:
        try:
            self._mounts.make_tmpfs(directory, VOLUME_BYTES, VOLUME_INODES)
        except BaseException:
            with suppress(OSError):  # report the first failure
                directory.rmdir()
            raise

    def _make_target(self, target: Path) -> bool:
        """Create the target directory with the kubelet's mode 0750. Return False if it exists."""
        with translate_os_errors("target_path", "create the directory", target):
            created = _make_target_directory(target)
            if not created:
                self._mounts.unmount(target)
                _make_target_directory(target)  # the link of DirectoryMounts was removed
        if target.is_symlink() or not target.is_dir():
            problem = f"{target} is not a directory"
            raise CertmountError(Reason.INVALID_TARGET_PATH, Fault("target_path", problem, "remove it from the node"))
        return created

    def _erase(self, directory: Path) -> None:
        """Do what :meth:`remove` says. The files must be erased because another mount namespace can have a copy of the mount."""
        with ExitStack() as stack, translate_os_errors("volume", "remove", directory):
            erased = []
            for name in (_FILES, PRIVATE):
                with suppress(FileNotFoundError, NotADirectoryError):
                    # The open directory stays accessible after its file system is unmounted.
                    flags = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW
                    erased.append(stack.enter_context(open_descriptor(directory / name, flags)))
            self._mounts.unmount(directory)
            remove_directory(directory)
            for opened in erased:
                erase_files(opened)

    def _usable_record(self, directory: Path, *, bound: bool) -> VolumeRecord | None:
        """Return the record of a mounted volume. If it is unusable, raise ValueError, or return None if no pod sees it."""
        try:
            return self._read_record(directory)
        except (OSError, ValueError) as error:
            if isinstance(error, OSError) and error.errno not in _ABSENT:
                raise  # the record can be intact
            if not bound:
                return None
            with suppress(FileNotFoundError):
                (directory / _RECORD).replace(directory / _CORRUPT)
            problem = f"{_RECORD} is missing" if isinstance(error, FileNotFoundError) else f"{_RECORD}: {error}"
            raise ValueError(problem) from error

    def _read_record(self, directory: Path) -> VolumeRecord:
        with (directory / _RECORD).open("rb") as file:
            record = VolumeRecord.from_json(file.read(MAX_RECORD_BYTES + 1))
        if self.key(record.volume_id) != directory.name:
            raise ValueError(f"volume_id: {record.volume_id!r} belongs to another volume")
        return record


def _may_be_directory(path: Path) -> bool:
    """Return False only if the path is certainly no directory. What Path.is_dir does depends on the Python version."""
    try:
        return stat.S_ISDIR(path.stat().st_mode)
    except OSError as error:
        return error.errno not in _ABSENT


def _make_target_directory(target: Path) -> bool:
    """Create the directory. Return False if the path exists."""
    try:
        target.mkdir()
    except FileExistsError:
        return False
    target.chmod(0o750)
    return True
