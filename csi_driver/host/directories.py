"""Removing a folder without harm to what is mounted in it."""

from __future__ import annotations

import errno
import os
import shutil
from pathlib import Path

from csi_driver.host.mountinfo import mount_id


def remove_folder(folder: Path) -> None:
    """Removes a folder with all that is in it; a missing one is no error.

    OSError EBUSY, with nothing removed, when something is mounted on it or anywhere in it.
    """
    try:
        folder.rmdir()  # nearly always it is empty; the kernel refuses a mount point
    except FileNotFoundError:
        return
    except OSError as error:
        if error.errno != errno.ENOTEMPTY:
            raise
    else:
        return
    own = _mount_of(folder)
    for parent, names, _ in os.walk(folder):
        for path in (Path(parent, name) for name in names):
            if _mount_of(path) != own:
                raise OSError(errno.EBUSY, "something is mounted in it", str(path))
    shutil.rmtree(folder)


def _mount_of(path: Path) -> int:
    descriptor = os.open(path, os.O_PATH | os.O_NOFOLLOW | os.O_CLOEXEC)
    try:
        return mount_id(descriptor)
    finally:
        os.close(descriptor)
