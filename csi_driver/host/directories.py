"""Open directories, and remove them without touching anything that is mounted in them."""

from __future__ import annotations

import errno
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from csi_driver.host.mountinfo import mount_id


@contextmanager
def open_descriptor(path: Path | str, flags: int, dir_fd: int | None = None) -> Iterator[int]:
    """Open a path with the given flags and O_CLOEXEC, and close it after the block."""
    descriptor = os.open(path, flags | os.O_CLOEXEC, dir_fd=dir_fd)
    try:
        yield descriptor
    finally:
        os.close(descriptor)


def remove_directory(directory: Path) -> None:
    """Remove a directory with its content. A missing directory is not an error.

    Raises OSError EBUSY, and removes nothing, if something is mounted on it or in it.
    """
    try:
        directory.rmdir()  # usually it is empty; the kernel rejects a mount point
    except FileNotFoundError:
        return
    except OSError as error:
        if error.errno != errno.ENOTEMPTY:
            raise
    else:
        return
    own = _mount_id_of(directory)
    for parent, names, _ in os.walk(directory):
        for path in (Path(parent, name) for name in names):
            if _mount_id_of(path) != own:
                raise OSError(errno.EBUSY, "something is mounted in it", str(path))
    shutil.rmtree(directory)


def _mount_id_of(path: Path) -> int:
    with open_descriptor(path, os.O_PATH | os.O_NOFOLLOW) as descriptor:
        return mount_id(descriptor)
