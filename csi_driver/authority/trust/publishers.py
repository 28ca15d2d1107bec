"""Publish root certificates where nodes and people find them before their first call to the authority."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from csi_driver.core.errors import CertmountError, Fault, Reason
from csi_driver.host.atomic_write import replace_file

PODS_ROOTS, AUTHORITYS_ROOT = "root.crt", "authority.crt"


class RootPublisher(Protocol):
    """Publishes two files (PEM)."""

    async def publish(self, roots: bytes, authority: bytes) -> None:
        """Write the roots that pods trust and the root of the authority's serving certificate, if they differ.

        Raises CertmountError RootCertificateMissing if that fails.
        """


@dataclass(frozen=True, slots=True)
class DirectoryPublisher:
    """Publishes ``root.crt`` and ``authority.crt`` in a directory."""

    directory: Path

    async def publish(self, roots: bytes, authority: bytes) -> None:
        for name, pem in ((PODS_ROOTS, roots), (AUTHORITYS_ROOT, authority)):
            await asyncio.to_thread(_publish, self.directory / name, pem)


def _publish(file: Path, pem: bytes) -> None:
    try:
        if not file.is_file() or file.read_bytes() != pem:
            replace_file(file, pem, mode=0o644)
    except OSError as error:
        problem = f"cannot be written: {error.strerror}"
        raise CertmountError(Reason.ROOT_CERTIFICATE_MISSING, Fault(str(file), problem)) from None
