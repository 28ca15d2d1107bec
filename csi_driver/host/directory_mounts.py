"""Stand-ins for mounts where the process may not mount: the demo, and tests without root."""

from __future__ import annotations

import shutil
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Final

from csi_driver.host.os_errors import translate_os_errors

_MARK: Final = ".certmount-folder"


class DirectoryMounts:
    """A tmpfs is a plain folder with a mark in it, a bind is a symbolic link, unmounting removes them.

    There is no size limit and nothing is read-only, so it is no protection, only the same picture for who reads.
    """

    def make_tmpfs(self, point: Path, size_bytes: int, inodes: int) -> None:  # noqa: ARG002 - no limits in a folder
        """See :class:`~csi_driver.host.mounts.Mounts`; neither limit is enforced."""
        with translate_os_errors("volume", "make a folder at", point):
            point.chmod(0o700)
            (point / _MARK).touch(mode=0o600, exist_ok=False)

    def bind_read_only(self, source: Path, target: Path) -> None:
        """See :class:`~csi_driver.host.mounts.Mounts`. The empty folder at ``target`` gives way to a symbolic link."""
        with translate_os_errors("target_path", f"link {source} at", target):
            target.rmdir()
            target.symlink_to(source.absolute())

    def is_bound(self, source: Path, target: Path) -> bool:
        """See :class:`~csi_driver.host.mounts.Mounts`."""
        try:
            return target.readlink() == source.absolute() and source.is_dir()
        except OSError:
            return False

    def unmount(self, point: Path) -> None:
        """See :class:`~csi_driver.host.mounts.Mounts`. A link goes when it leads to a marked folder, or nowhere any more."""
        with translate_os_errors("volume", "remove", point):
            if point.is_symlink():
                source = point.readlink()
                if (source.parent / _MARK).exists() or not source.exists():
                    point.unlink()
            elif (point / _MARK).exists():
                for entry in point.iterdir():
                    shutil.rmtree(entry) if entry.is_dir() and not entry.is_symlink() else entry.unlink()

    def survey(self, points: Collection[Path]) -> Mapping[Path, bool]:
        """See :class:`~csi_driver.host.mounts.Mounts`. Links can't be found from here, so each folder may be shown."""
        return {point: True for point in points if (point / _MARK).exists()}
