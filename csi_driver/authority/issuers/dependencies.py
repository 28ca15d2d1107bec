"""What the authority provides to its issuers."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from csi_driver.authority.config.watched_file import read_regular_file
from csi_driver.authority.csr_api import CSRClient
from csi_driver.authority.issuers import Issuer, issuer_unavailable
from csi_driver.authority.storage import Store
from csi_driver.core.config.issuers import CredentialSource, FileSource, ParseConfiguration, SecretSource
from csi_driver.core.errors import CertmountError, Fault, Reason
from csi_driver.core.secret import Secret

MAX_BYTES = 64 * 1024

ReadSecret = Callable[[str, str], Awaitable[Mapping[str, Secret[bytes]]]]
"""Takes namespace and name of a Kubernetes Secret, and returns its values by key; raises CertmountError IssuerUnavailable."""


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
        content = _select(source, await self.read_secret(source.namespace, source.name))
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


def _select(source: SecretSource, values: Mapping[str, Secret[bytes]]) -> Secret[bytes]:
    if source.key not in values and source.only and len(values) == 1:
        return next(iter(values.values()))
    if source.key not in values:
        hint = f"it has {', '.join(sorted(values))}" if values else "it is empty"
        raise issuer_unavailable(f"Secret {source.namespace}/{source.name}", f"has no key {source.key}", hint)
    return values[source.key]


def _read_file(source: FileSource) -> Secret[bytes]:
    try:
        content = read_regular_file(Path(source.path), MAX_BYTES)
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
    """The authority's services for issuers. Outside a cluster, those of the cluster are None."""

    credentials: CredentialReader
    secret_store: Callable[[str, str], Store] | None = None  # Takes namespace and name of a shared Secret
    ingress_routes: Callable[[str], ChallengeRoutes] | None = None  # Takes the class of the Ingresses
    csrs: CSRAccess | None = None
    order_counter: Callable[[str], Callable[[str], None]] = lambda _issuer: lambda _result: None
    """Takes the name of an ACME issuer, and returns what counts its orders in metrics: by "issued" or "failed"."""


@dataclass(frozen=True, slots=True)
class IssuerKind:
    """One kind of issuer."""

    parse: ParseConfiguration
    make: Callable[[str, Any, IssuerDependencies], Issuer]
    """Takes the name and the parsed configuration; does no I/O; raises CertmountError InvalidIssuers."""


def not_possible(name: str, problem: str, hint: str) -> CertmountError:
    return CertmountError(Reason.INVALID_ISSUERS, Fault(f"issuer {name}", problem, hint))
