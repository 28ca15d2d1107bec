"""Convert OSError to CertmountError."""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from csi_driver.core.errors import CertmountError, Fault, Reason

_HINTS = {
    errno.EPERM: "the driver's container must be privileged",
    errno.EACCES: "the driver must run as root",
    errno.EROFS: "the host's kubelet directory must be mounted writable into the driver's container",
}


@contextmanager
def translate_os_errors(field: str, action: str, path: Path | str, full_hint: str = "") -> Iterator[None]:
    """Raise an OSError of the block as CertmountError MOUNT_FAILED, or NO_SPACE with ``full_hint`` if a limit is exhausted."""
    try:
        yield
    except OSError as error:
        number = error.errno or 0
        problem = f"could not {action} {path}: {os.strerror(number) if number else error}"
        if number in (errno.ENOSPC, errno.EDQUOT):
            raise CertmountError(Reason.NO_SPACE, Fault(field, problem, full_hint)) from error
        raise CertmountError(Reason.MOUNT_FAILED, Fault(field, problem, _HINTS.get(number, ""))) from error
