"""Mount the tmpfs of a volume, and bind it read-only at the pod's target path.

The mount source of every tmpfs and of its bind mounts is ``certmount``. The driver identifies its own mounts by it and
never unmounts others.
"""

from __future__ import annotations

import errno
import os
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Final, Protocol

from csi_driver.core.errors import CertmountError, Fault, Reason
from csi_driver.host import syscalls
from csi_driver.host.directories import open_descriptor
from csi_driver.host.mountinfo import MountEntry, find_mount, mount_id, read_mounts
from csi_driver.host.os_errors import translate_os_errors

SOURCE: Final = "certmount"

_TMPFS_FLAGS: Final = syscalls.MS_NOSUID | syscalls.MS_NODEV | syscalls.MS_NOEXEC
_BIND_ATTRIBUTES: Final = (
    syscalls.MOUNT_ATTR_RDONLY | syscalls.MOUNT_ATTR_NOSUID | syscalls.MOUNT_ATTR_NODEV | syscalls.MOUNT_ATTR_NOEXEC
)
_BIND_REMOUNT: Final = syscalls.MS_BIND | syscalls.MS_REMOUNT | syscalls.MS_RDONLY | _TMPFS_FLAGS
_DETACH: Final = syscalls.MNT_DETACH | syscalls.UMOUNT_NOFOLLOW
_MOUNT_LIMIT: Final = "the limit fs.mount-max of this node is reached"
_PATH: Final = os.O_PATH | os.O_NOFOLLOW  # do not follow a link, and pin the path while it is in use
_STAGING: Final = ".staging"
# An extended attribute that only root can access, xattr(7). It avoids reading the mount table, which can be long.
_MARK: Final = "trusted.certmount"
_DEEPEST_STACK: Final = 1000


class Mounts(Protocol):
    """The mount operations of a volume. Each raises CertmountError with the path and the kernel's error."""

    def make_tmpfs(self, point: Path, size_bytes: int, inodes: int) -> None:
        """Mount a new tmpfs with mode 0700 on the existing directory ``point``, which must not be a mount point."""

    def bind_read_only(self, source: Path, target: Path) -> None:
        """Bind ``source`` on the existing directory ``target``, which must not be a mount point."""

    def is_bound(self, source: Path, target: Path) -> bool:
        """Return True if ``target`` shows ``source`` read-only. Costs a few stat calls and never raises."""

    def unmount(self, point: Path) -> None:
        """Unmount all mounts of the driver that are stacked on ``point``, if any."""

    def survey(self, points: Collection[Path]) -> Mapping[Path, bool]:
        """Return those of ``points`` that are a tmpfs of the driver, and whether a target path may show it."""


class KernelMounts:
    """Mounts of the Linux kernel; needs CAP_SYS_ADMIN. See :class:`Mounts` for the methods.

    ``detached=False`` uses the system calls of kernels before Linux 5.12. The class also detects those by ENOSYS.
    """

    def __init__(self, *, detached: bool = True) -> None:
        self._detached = detached
        self._noswap = True

    def make_tmpfs(self, point: Path, size_bytes: int, inodes: int) -> None:
        """Mount a tmpfs, with ``noswap`` if the kernel supports it (Linux 6.4)."""
        options = f"mode=0700,size={size_bytes},nr_inodes={inodes}"
        with (
            translate_os_errors("volume", "mount a tmpfs at", point, _MOUNT_LIMIT),
            _vacant("volume", point) as directory,
        ):
            self._mount_tmpfs(f"/proc/self/fd/{directory}", options)
            _mark(point)

    def _mount_tmpfs(self, place: str, options: str) -> None:
        if self._noswap:
            try:
                syscalls.mount(SOURCE, place, "tmpfs", _TMPFS_FLAGS, f"{options},noswap")
            except OSError as error:
                if error.errno != errno.EINVAL:
                    raise
            else:
                return
        syscalls.mount(SOURCE, place, "tmpfs", _TMPFS_FLAGS, options)
        self._noswap = False  # the mount works without the option, so the option was the cause

    def bind_read_only(self, source: Path, target: Path) -> None:
        """Bind ``source``, read-only from the start and in every mount namespace that receives the mount."""
        with (
            translate_os_errors("target_path", f"bind {source} at", target, _MOUNT_LIMIT),
            _vacant("target_path", target) as directory,
        ):
            _mark(source)
            if self._detached:
                try:
                    _bind_detached(source, directory)
                except OSError as error:
                    if error.errno != errno.ENOSYS:
                        raise
                    self._detached = False
                else:
                    return
            self._bind_staged(source, directory)

    def _bind_staged(self, source: Path, directory: int) -> None:
        # A remount does not propagate to other mount namespaces, but a bind copies the flags of its source mount to all
        # of them. So make a read-only copy next to the source, and bind the target from the copy.
        staging = source.with_name(_STAGING)
        self.unmount(staging)
        staging.mkdir(mode=0o700, exist_ok=True)
        try:
            syscalls.mount(str(source), str(staging), None, syscalls.MS_BIND)
            syscalls.mount(None, str(staging), None, _BIND_REMOUNT)
            syscalls.mount(str(staging), f"/proc/self/fd/{directory}", None, syscalls.MS_BIND)
        finally:
            self.unmount(staging)
            staging.rmdir()

    def is_bound(self, source: Path, target: Path) -> bool:
        """Compare device and inode, which are unique because each volume has its own tmpfs."""
        try:
            actual, expected = os.lstat(target), os.lstat(source)
            same = actual.st_ino == expected.st_ino and actual.st_dev == expected.st_dev
            return same and bool(os.statvfs(target).f_flag & os.ST_RDONLY)
        except OSError:
            return False

    def unmount(self, point: Path) -> None:
        """Unmount lazily, because a process can still use the mount. A foreign mount on top of ours is an error."""
        with translate_os_errors("volume", "unmount", point):
            for _ in range(_DEEPEST_STACK):
                top = _mount_at(point)
                if top is None:
                    return
                if not _is_marked(point):
                    mount = find_mount(top)
                    if mount is None:  # it was unmounted meanwhile
                        continue
                    if not _is_ours(mount):
                        _check_not_covered(point, mount)
                        return
                syscalls.unmount(str(point), _DETACH)

    def survey(self, points: Collection[Path]) -> Mapping[Path, bool]:
        """Read the mount table once."""
        parents = {parent: os.path.realpath(parent) for parent in {point.parent for point in points}}
        by_real_path = {f"{parents[point.parent]}/{point.name}": point for point in points}
        devices: dict[Path, str] = {}
        bound: set[str] = set()
        for mount in read_mounts():
            if not _is_ours(mount):
                continue
            if mount.point in by_real_path:
                devices[by_real_path[mount.point]] = mount.device
            else:
                bound.add(mount.device)
        # Before Linux 5.8, a read can omit a line while other mounts are removed. If in doubt, a target path shows the tmpfs.
        omitted = [point for point in points if point not in devices and _is_marked(point)]
        return {point: device in bound for point, device in devices.items()} | dict.fromkeys(omitted, True)


def _bind_detached(source: Path, directory: int) -> None:
    tree = syscalls.clone_tree(str(source))
    try:
        syscalls.set_mount_attributes(tree, _BIND_ATTRIBUTES)
        syscalls.attach_tree(tree, directory)
    finally:
        os.close(tree)


def _mark(directory: Path) -> None:
    with suppress(OSError):  # without the attribute, unmounting reads the mount table
        os.setxattr(directory, _MARK, b"", follow_symlinks=False)


def _is_marked(directory: Path) -> bool:
    try:
        os.getxattr(directory, _MARK, follow_symlinks=False)
    except OSError:
        return False
    return True


def _is_ours(mount: MountEntry) -> bool:
    return mount.source == SOURCE and mount.fs_type == "tmpfs"


def _mount_at(point: Path) -> int | None:
    """Return the ID of the topmost mount on ``point``, or None if nothing is mounted there."""
    with (
        suppress(FileNotFoundError, NotADirectoryError),
        open_descriptor(point, _PATH) as here,
        open_descriptor(point.parent, _PATH) as above,
    ):
        own = mount_id(here)
        return own if own != mount_id(above) else None
    return None


@contextmanager
def _vacant(field: str, point: Path) -> Iterator[int]:
    """Open an existing directory that is not a mount point, and prevent stacked mounts."""
    with open_descriptor(point, _PATH | os.O_DIRECTORY) as here, open_descriptor(point.parent, _PATH) as above:
        if mount_id(here) != mount_id(above):
            problem = f"{point} is already a mount point"
            raise CertmountError(Reason.INVALID_TARGET_PATH, Fault(field, problem, f"run: umount {point}"))
        yield here


def _check_not_covered(point: Path, top: MountEntry) -> None:
    if any(mount.point == top.point and _is_ours(mount) for mount in read_mounts()):
        problem = f"a {top.fs_type} of {top.source!r} covers the driver's mount on {point}"
        raise CertmountError(Reason.MOUNT_FAILED, Fault("volume", problem, f"run: umount {point}"))
