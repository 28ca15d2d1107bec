"""Replace files atomically."""

from __future__ import annotations

import os
from pathlib import Path

from csi_driver.host.directories import open_descriptor


def replace_file(file: Path, content: bytes, *, mode: int, owner_of: Path | None = None, durable: bool = True) -> None:
    """Write a file atomically: readers see either the old or the new content. Raises OSError.

    If ``durable``, this is also true after a power failure. If root calls this, the file gets the owner of ``owner_of``,
    because the authority must be able to read what an administrator's command wrote.
    """
    temporary = file.with_name(f".{file.name}.{os.getpid()}")
    descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_NOFOLLOW | os.O_CLOEXEC, mode)
    try:
        with os.fdopen(descriptor, "wb") as stream:
            os.fchmod(descriptor, mode)
            if owner_of is not None and os.geteuid() == 0:
                owner = owner_of.stat()
                os.fchown(descriptor, owner.st_uid, owner.st_gid)
            stream.write(content)
            stream.flush()
            if durable:
                os.fsync(descriptor)
        temporary.replace(file)
    except OSError:
        temporary.unlink(missing_ok=True)
        raise
    if durable:
        with open_descriptor(file.parent, os.O_RDONLY | os.O_DIRECTORY) as directory:
            os.fsync(directory)
