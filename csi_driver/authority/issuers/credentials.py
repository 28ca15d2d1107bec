"""Reads the credentials that the issuers file refers to."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from pathlib import Path

from csi_driver.authority.issuers.errors import issuer_unavailable
from csi_driver.core.config.issuers import CredentialSource, FileSource
from csi_driver.core.secret import Secret

MAX_BYTES = 64 * 1024

ReadSecret = Callable[[str, str, str], Awaitable[Secret[bytes]]]
"""Takes namespace, name and key of a Kubernetes Secret; raises CertmountError IssuerUnavailable."""


@dataclass(frozen=True, slots=True)
class CredentialReader:
    """Reads a credential at each use, so that replacing it does not need a restart."""

    read_secret: ReadSecret | None = None  # None outside a cluster, where credentials can only be files

    async def read(self, source: CredentialSource) -> Secret[bytes]:
        """Return the credential; raise CertmountError IssuerUnavailable, which names the source and shows no content."""
        if isinstance(source, FileSource):
            return await asyncio.to_thread(_read_file, source)
        if self.read_secret is None:
            raise issuer_unavailable(str(source), "cannot be read outside a cluster", "store it in a file")
        content = await self.read_secret(source.namespace, source.name, source.key)
        if not content.reveal():
            raise issuer_unavailable(str(source), "is empty")
        return content


def _read_file(source: FileSource) -> Secret[bytes]:
    try:
        with Path(source.path).open("rb") as file:
            content = file.read(MAX_BYTES + 1)
    except OSError as error:
        raise issuer_unavailable(str(source), f"cannot be read: {error.strerror}") from None
    if not 0 < len(content) <= MAX_BYTES:
        raise issuer_unavailable(str(source), "is empty" if not content else f"is longer than {MAX_BYTES} bytes")
    return Secret(content)
