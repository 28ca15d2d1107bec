"""What the authority provides to its issuers."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from csi_driver.authority.csr_api import CSRClient
from csi_driver.authority.issuers import Issuer, issuer_unavailable
from csi_driver.authority.storage import Store
from csi_driver.core.config.issuers import CredentialSource, FileSource, ParseConfiguration
from csi_driver.core.errors import CertmountError, Fault, Reason
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

    async def read_text(self, source: CredentialSource) -> Secret[str]:
        """Return the credential without surrounding white space; raise as :meth:`read`, also if it is not ASCII."""
        content = await self.read(source)
        try:
            return Secret(content.reveal().decode("ascii").strip())
        except UnicodeDecodeError:
            raise issuer_unavailable(str(source), "is not ASCII text") from None


def _read_file(source: FileSource) -> Secret[bytes]:
    try:
        with Path(source.path).open("rb") as file:
            content = file.read(MAX_BYTES + 1)
    except OSError as error:
        raise issuer_unavailable(str(source), f"cannot be read: {error.strerror}") from None
    if not 0 < len(content) <= MAX_BYTES:
        raise issuer_unavailable(str(source), "is empty" if not content else f"is longer than {MAX_BYTES} bytes")
    return Secret(content)


class ChallengeRoutes(Protocol):
    """Routes HTTP-01 requests of a CA to the authority."""

    async def open(self, name: str, token: str) -> None:
        """Route requests for the token at this host name to the authority, if they are not routed already."""

    async def close(self, name: str, token: str) -> None:
        """Remove the route, if it exists."""


@dataclass(frozen=True, slots=True)
class CSRAccess:
    """The cluster's CertificateSigningRequests."""

    requests: CSRClient
    internal_roots: Callable[[], tuple[bytes, ...]] = tuple  # X.509 DER; empty while they are unknown


@dataclass(frozen=True, slots=True)
class IssuerDependencies:
    """The authority's services for issuers. Outside a cluster everything but the credentials is None."""

    credentials: CredentialReader
    secret_store: Callable[[str, str], Store] | None = None  # Takes namespace and name of a shared Secret
    ingress_routes: Callable[[str], ChallengeRoutes] | None = None  # Takes the class of the Ingresses
    csrs: CSRAccess | None = None


@dataclass(frozen=True, slots=True)
class IssuerKind:
    """One kind of issuer."""

    parse: ParseConfiguration
    make: Callable[[str, Any, IssuerDependencies], Issuer]
    """Takes the name and the parsed configuration; does no I/O; raises CertmountError InvalidIssuers."""


def not_possible(name: str, problem: str, hint: str) -> CertmountError:
    return CertmountError(Reason.INVALID_ISSUERS, Fault(f"issuer {name}", problem, hint))
