"""What the authority needs of a cluster's CertificateSigningRequests, as a requester and as a signer."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

from csi_driver.core.cluster.csr import ClusterCSR, CSRCondition, CSRDraft
from csi_driver.core.cluster.lease import Lease
from csi_driver.core.cluster.pod import LivePod
from csi_driver.kube.csrs import CSRs


class WatchTask(Protocol):
    """A watch that keeps what is known of requests up to date."""

    async def run(self) -> None:
        """For ever."""


class CSRClient(Protocol):
    """Requests at the API server. Each method raises CertmountError IssuerUnavailable."""

    async def own_username(self) -> str:
        """Whom the API server takes the authority for."""

    async def create(self, draft: CSRDraft) -> ClusterCSR:
        """Makes it under a name of the API server's choice."""

    async def decide(self, csr: ClusterCSR, condition: CSRCondition) -> ClusterCSR:
        """Approves or denies it, unless someone has done either; gives what there is then."""

    async def answer(self, csr: ClusterCSR, certificate: bytes) -> ClusterCSR:
        """Writes the certificate (PEM), unless it is finished otherwise; gives what there is then."""

    async def fail(self, csr: ClusterCSR, condition: CSRCondition) -> ClusterCSR:
        """Says that it won't be signed though it was approved, unless it is finished; gives what there is then."""

    async def delete(self, csr: ClusterCSR) -> None:
        """Removes this very one; also where it is gone already."""

    async def may(self, verb: str, resource: str, name: str = "") -> bool:
        """Whether the authority has a permission in the group certificates.k8s.io; raises TokenReviewUnavailable, too."""

    def follow(self, sink: CSRs, *, signer: str = "", labels: str = "") -> WatchTask:
        """Keeps the sink up to date with those of a signer, or with these labels (``key=value``), once it runs."""


class PodReader(Protocol):
    """Pods as the cluster has them at this moment."""

    async def find(self, namespace: str, name: str) -> LivePod | None:
        """None where there is none; raises CertmountError TokenReviewUnavailable."""


class LeaseStore(Protocol):
    """One lease that all replicas share."""

    async def load(self) -> Lease:
        """Raises CertmountError."""

    async def save(self, lease: Lease) -> bool:
        """False where it has changed since it was read; raises CertmountError."""


@dataclass(frozen=True, slots=True)
class CSRApi:
    """The cluster, for those who make and those who sign requests."""

    requests: CSRClient
    pods: PodReader
    lease: LeaseStore
    """Whose holder signs."""
    holder: str
    """This replica's name, no other's."""
