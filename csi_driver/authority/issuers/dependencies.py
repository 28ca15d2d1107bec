"""What the authority provides to its issuers."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

from csi_driver.authority.csr_api import CSRClient
from csi_driver.authority.issuers import Issuer
from csi_driver.authority.issuers.credentials import CredentialReader
from csi_driver.authority.storage import Store
from csi_driver.core.config.issuers import ParseConfiguration
from csi_driver.core.errors import CertmountError, Fault, Reason


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
    internal_roots: Callable[[], tuple[bytes, ...]] = tuple
    """Returns the roots of the internal CA: X.509 DER; empty while they are unknown."""


@dataclass(frozen=True, slots=True)
class IssuerDependencies:
    """The authority's services for issuers. Outside a cluster everything but the credentials is None."""

    credentials: CredentialReader
    secret_store: Callable[[str, str], Store] | None = None
    """Takes namespace and name of a Secret that stores state for all replicas."""
    ingress_routes: Callable[[str], ChallengeRoutes] | None = None
    """Takes the class of the Ingresses that lead to the authority's HTTP-01 port."""
    csrs: CSRAccess | None = None


@dataclass(frozen=True, slots=True)
class IssuerKind:
    """One kind of issuer."""

    parse: ParseConfiguration
    make: Callable[[str, Any, IssuerDependencies], Issuer]
    """Takes the issuer's name and the configuration from ``parse``. It does no I/O: that begins with the issuer's ``run``.

    Raises CertmountError InvalidIssuers if a dependency is missing.
    """


def not_possible(name: str, problem: str, hint: str) -> CertmountError:
    """Return the error for an issuer that can't be created here."""
    return CertmountError(Reason.INVALID_ISSUERS, Fault(f"issuer {name}", problem, hint))
