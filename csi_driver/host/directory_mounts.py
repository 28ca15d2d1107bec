"""Directories and symbolic links instead of mounts, for the demo and for tests without root."""

from __future__ import annotations

import shutil
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Final

from csi_driver.host.os_errors import translate_os_errors

_MARKER: Final = ".certmount-directory"


class DirectoryMounts:
    """A directory with a marker file replaces a tmpfs, and a symbolic link replaces a bind mount.

    See :class:`~csi_driver.host.mounts.Mounts` for the methods. This is no protection: there is no size limit, and
    nothing is read-only.
    """

    def make_tmpfs(self, point: Path, size_bytes: int, inodes: int) -> None:  # noqa: ARG002 - directories have no limits
        with translate_os_errors("volume", "create a directory at", point):
            point.chmod(0o700)
            (point / _MARKER).touch(mode=0o600, exist_ok=False)

    def bind_read_only(self, source: Path, target: Path) -> None:
        with translate_os_errors("target_path", f"link {source} at", target):
            target.rmdir()
            target.symlink_to(source.absolute())

    def is_bound(self, source: Path, target: Path) -> bool:
        try:
            return target.readlink() == source.absolute() and source.is_dir()
        except OSError:
            return False

    def unmount(self, point: Path) -> None:
        """Remove a link to a marked directory, a dangling link, or the content of a marked directory."""
        with translate_os_errors("volume", "remove", point):
            if point.is_symlink():
                source = point.readlink()
                if (source.parent / _MARKER).exists() or not source.exists():
                    point.unlink()
            elif (point / _MARKER).exists():
                for entry in point.iterdir():
                    shutil.rmtree(entry) if entry.is_dir() and not entry.is_symlink() else entry.unlink()

    def survey(self, points: Collection[Path]) -> Mapping[Path, bool]:
        """Return the marked directories. Links cannot be found from here, so each directory may be bound."""
        return {point: True for point in points if (point / _MARKER).exists()}
