"""The Kubernetes API for CertificateSigningRequests, as the authority uses it as a requester and as a signer."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Protocol

from csi_driver.core.cluster.csr import ClusterCSR, CSRCondition, CSRDraft
from csi_driver.core.cluster.objects import LivePod
from csi_driver.kube.csr.cache import CSRCache
from csi_driver.kube.leader_election import LeaseStore


class WatchTask(Protocol):
    """A watch that keeps a cache of requests current."""

    async def run(self) -> None: ...


class CSRClient(Protocol):
    """CertificateSigningRequests at the API server. All methods raise CertmountError IssuerUnavailable."""

    async def own_username(self) -> str:
        """Return the user name of the authority, as the API server records it in requests."""

    async def create(self, draft: CSRDraft) -> ClusterCSR: ...

    async def decide(self, csr: ClusterCSR, condition: CSRCondition) -> ClusterCSR:
        """Approve or deny a request that is neither yet; return the current request."""

    async def set_certificate(self, csr: ClusterCSR, certificate: bytes) -> ClusterCSR:
        """Write the certificate (PEM) unless the request is finished; return the current request."""

    async def fail(self, csr: ClusterCSR, condition: CSRCondition) -> ClusterCSR:
        """Mark an approved request as failed unless it is finished; return the current request."""

    async def delete(self, csr: ClusterCSR) -> None:
        """Delete exactly this request, if it still exists."""

    async def is_permitted(self, verb: str, resource: str, name: str = "") -> bool:
        """Return whether the authority has a permission in certificates.k8s.io; also raises TokenReviewUnavailable."""

    def watch(self, sink: CSRCache, *, signer: str = "", labels: str = "") -> WatchTask:
        """Return a watch of the requests for a signer, or with these labels (``key=value``), that updates ``sink``."""


FindPod = Callable[[str, str], Awaitable[LivePod | None]]
"""Takes namespace and name; the result is None if the pod does not exist. Raises CertmountError TokenReviewUnavailable."""


@dataclass(frozen=True, slots=True)
class CSRApi:
    """The clients for requesting and for signing."""

    requests: CSRClient
    find_pod: FindPod
    lease: LeaseStore  # of the replica that signs
    holder: str  # the unique name of this replica
