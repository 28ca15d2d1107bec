"""What such an issuer needs of the API server."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

from csi_driver.core.cluster_csr import ClusterCSR, Condition, Draft
from csi_driver.kube.csrs import CSRs


class Following(Protocol):
    """A watch that keeps what is known of requests up to date."""

    @property
    def synced(self) -> bool:
        """True once all there is has been read."""

    async def run(self) -> None:
        """For ever."""


class Requests(Protocol):
    """Requests at the API server. Each method raises CertmountError IssuerUnavailable."""

    async def own_username(self) -> str:
        """Whom the API server takes the authority for."""

    async def create(self, draft: Draft) -> ClusterCSR:
        """Makes it under a name of the API server's choice."""

    async def decide(self, csr: ClusterCSR, condition: Condition) -> ClusterCSR:
        """Approves or denies it, unless someone has done either; gives what there is then."""

    async def delete(self, csr: ClusterCSR) -> None:
        """Removes this very one; also where it is gone already."""

    async def may(self, verb: str, resource: str, name: str = "") -> bool:
        """Whether the authority has a permission in the group certificates.k8s.io."""

    def follow(self, sink: CSRs, *, signer: str = "", labels: str = "") -> Following:
        """Keeps the sink up to date with those that have the labels, once it runs."""


@dataclass(frozen=True, slots=True)
class Access:
    """The cluster, for issuers of this kind."""

    requests: Requests
    internal_roots: Callable[[], tuple[bytes, ...]] = tuple
    """Of the internal CA: X.509 DER; none where it is not known."""
