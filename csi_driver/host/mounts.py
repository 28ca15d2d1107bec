"""A volume's tmpfs and its read-only bind at the pod's target.

The mount source of every tmpfs is ``certmount``, and a bind of it shows the same source: so the mount table alone tells
our mounts from others', and nothing else is ever unmounted.
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
from csi_driver.host.mountinfo import MountEntry, find_mount, mount_id, read_mounts
from csi_driver.host.os_errors import translate_os_errors

__all__ = ["SOURCE", "KernelMounts", "Mounts"]

SOURCE: Final = "certmount"

_TMPFS_FLAGS: Final = syscalls.MS_NOSUID | syscalls.MS_NODEV | syscalls.MS_NOEXEC
_BIND_ATTRIBUTES: Final = (
    syscalls.MOUNT_ATTR_RDONLY | syscalls.MOUNT_ATTR_NOSUID | syscalls.MOUNT_ATTR_NODEV | syscalls.MOUNT_ATTR_NOEXEC
)
_BIND_REMOUNT: Final = syscalls.MS_BIND | syscalls.MS_REMOUNT | syscalls.MS_RDONLY | _TMPFS_FLAGS
_DETACH: Final = syscalls.MNT_DETACH | syscalls.UMOUNT_NOFOLLOW
_MOUNT_LIMIT: Final = "the limit fs.mount-max of this node is reached"
_STAGING: Final = ".staging"
# Only root can set or see it, xattr(7). It tells our folders without the mount table, which is long on a busy node.
_MARK: Final = "trusted.certmount"
_DEEPEST_STACK: Final = 1000


class Mounts(Protocol):
    """What the volumes need of mounts. Every failure is a CertmountError with the path and the kernel's words."""

    def make_tmpfs(self, point: Path, size_bytes: int, inodes: int) -> None:
        """Mounts a new tmpfs, mode 0700, at the existing folder ``point``, which must not be a mount point yet."""

    def bind_read_only(self, source: Path, target: Path) -> None:
        """Shows the folder ``source`` at the existing folder ``target``, which must not be a mount point yet."""

    def is_bound(self, source: Path, target: Path) -> bool:
        """True when ``target`` shows ``source`` read-only; costs a few stat calls, never raises."""

    def unmount(self, point: Path) -> None:
        """Takes off all of our mounts that are stacked at ``point``. Nothing there, or nothing of ours: no error."""

    def survey(self, points: Collection[Path]) -> Mapping[Path, bool]:
        """Those of ``points`` where a tmpfs of ours is mounted, and whether a target may still show it."""


class KernelMounts:
    """Real mounts; needs CAP_SYS_ADMIN.

    ``detached`` False is the way of kernels before Linux 5.12, which are also recognised by their ENOSYS.
    """

    def __init__(self, *, detached: bool = True) -> None:
        self._detached = detached
        self._noswap = True

    def make_tmpfs(self, point: Path, size_bytes: int, inodes: int) -> None:
        """See :class:`Mounts`. Without swap where the kernel knows ``noswap`` (Linux 6.4): found out once, by trying."""
        options = f"mode=0700,size={size_bytes},nr_inodes={inodes}"
        with translate_os_errors("volume", "mount a tmpfs at", point, _MOUNT_LIMIT), _vacant("volume", point) as folder:
            self._mount_tmpfs(f"/proc/self/fd/{folder}", options)
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
        self._noswap = False  # only now is it sure that the option was at fault

    def bind_read_only(self, source: Path, target: Path) -> None:
        """See :class:`Mounts`. It is read-only from its first moment, and in every mount namespace it spreads to."""
        with (
            translate_os_errors("target_path", f"bind {source} at", target, _MOUNT_LIMIT),
            _vacant("target_path", target) as folder,
        ):
            _mark(source)
            if self._detached:
                try:
                    _bind_detached(source, folder)
                except OSError as error:
                    if error.errno != errno.ENOSYS:
                        raise
                    self._detached = False
                else:
                    return
            self._bind_staged(source, folder)

    def _bind_staged(self, source: Path, folder: int) -> None:
        # A remount does not spread to other mount namespaces, but a bind copies the flags of the mount it is made from,
        # wherever it spreads to. So a copy is made read-only beside the source first, and the target is bound from it.
        staging = source.with_name(_STAGING)
        self.unmount(staging)
        staging.mkdir(mode=0o700, exist_ok=True)
        try:
            syscalls.mount(str(source), str(staging), None, syscalls.MS_BIND)
            syscalls.mount(None, str(staging), None, _BIND_REMOUNT)
            syscalls.mount(str(staging), f"/proc/self/fd/{folder}", None, syscalls.MS_BIND)
        finally:
            self.unmount(staging)
            staging.rmdir()

    def is_bound(self, source: Path, target: Path) -> bool:
        """See :class:`Mounts`. Each volume has its own tmpfs, so device and inode name the folder beyond doubt."""
        try:
            shown, wanted = os.lstat(target), os.lstat(source)
            same = shown.st_ino == wanted.st_ino and shown.st_dev == wanted.st_dev
            return same and bool(os.statvfs(target).f_flag & os.ST_RDONLY)
        except OSError:
            return False

    def unmount(self, point: Path) -> None:
        """See :class:`Mounts`. Lazily, as a process may still be inside. A stranger's mount on top of ours is an error."""
        with translate_os_errors("volume", "unmount", point):
            for _ in range(_DEEPEST_STACK):
                top = _mount_at(point)
                if top is None:
                    return
                if not _is_marked(point):
                    mount = find_mount(top)
                    if mount is None:  # it went away in between
                        continue
                    if not _is_ours(mount):
                        _refuse_covered(point, mount)
                        return
                syscalls.unmount(str(point), _DETACH)

    def survey(self, points: Collection[Path]) -> Mapping[Path, bool]:
        """See :class:`Mounts`. Reads the mount table once."""
        parents = {parent: os.path.realpath(parent) for parent in {point.parent for point in points}}
        wanted = {f"{parents[point.parent]}/{point.name}": point for point in points}
        devices: dict[Path, str] = {}
        bound: set[str] = set()
        for mount in read_mounts():
            if not _is_ours(mount):
                continue
            if mount.point in wanted:
                devices[wanted[mount.point]] = mount.device
            else:
                bound.add(mount.device)
        return {point: device in bound for point, device in devices.items()}


def _bind_detached(source: Path, folder: int) -> None:
    tree = syscalls.clone_tree(str(source))
    try:
        syscalls.set_mount_attributes(tree, _BIND_ATTRIBUTES)
        syscalls.attach_tree(tree, folder)
    finally:
        os.close(tree)


def _mark(folder: Path) -> None:
    with suppress(OSError):  # where that is not possible, unmounting reads the mount table
        os.setxattr(folder, _MARK, b"", follow_symlinks=False)


def _is_marked(folder: Path) -> bool:
    try:
        os.getxattr(folder, _MARK, follow_symlinks=False)
    except OSError:
        return False
    return True


def _is_ours(mount: MountEntry) -> bool:
    return mount.source == SOURCE and mount.fs_type == "tmpfs"


def _mount_at(point: Path) -> int | None:
    """The id of the topmost mount at ``point`` itself; None when nothing is mounted there or it does not exist."""
    with suppress(FileNotFoundError, NotADirectoryError), _place(point) as here, _place(point.parent) as above:
        own = mount_id(here)
        return own if own != mount_id(above) else None
    return None


@contextmanager
def _place(path: Path, flags: int = 0) -> Iterator[int]:
    """Holds on to what is at ``path``, a symbolic link not followed, so that it can't be exchanged meanwhile."""
    descriptor = os.open(path, os.O_PATH | os.O_NOFOLLOW | os.O_CLOEXEC | flags)
    try:
        yield descriptor
    finally:
        os.close(descriptor)


@contextmanager
def _vacant(field: str, point: Path) -> Iterator[int]:
    """An existing folder that nothing is mounted on: this is what makes stacked mounts impossible."""
    with _place(point, os.O_DIRECTORY) as here, _place(point.parent) as above:
        if mount_id(here) != mount_id(above):
            problem = f"{point} is a mount point already"
            raise CertmountError(Reason.INVALID_TARGET_PATH, Fault(field, problem, f"run: umount {point}"))
        yield here


def _refuse_covered(point: Path, top: MountEntry) -> None:
    if any(mount.point == top.point and _is_ours(mount) for mount in read_mounts()):
        problem = f"a {top.fs_type} of {top.source!r} is mounted over our mount at {point}"
        raise CertmountError(Reason.MOUNT_FAILED, Fault("volume", problem, f"run: umount {point}"))
