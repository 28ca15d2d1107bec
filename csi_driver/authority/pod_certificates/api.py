"""The Kubernetes API for pod certificates, as the signer uses it. All methods raise CertmountError IssuerUnavailable."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

from csi_driver.authority.csr_api import FindPod, WatchTask
from csi_driver.authority.pod_certificates.namespaces import RootConfigMapWriter
from csi_driver.core.cluster.csr import CERTMOUNT_SIGNER, parse_signer
from csi_driver.core.cluster.pod_certificates import PodCertificateDecision, PodCertificateRequest, PublishedBundle
from csi_driver.core.names import InvalidName, parse_dns_label
from csi_driver.core.spec import DEFAULT_ISSUER
from csi_driver.kube.leader_election import LeaseStore
from csi_driver.kube.pod_certificates.request_cache import RequestCache

ROOTS_LABEL = "certmount.dev/roots", "true"
"""The label of namespaces that get a ConfigMap with the roots."""


@dataclass(frozen=True, slots=True)
class PodSigner:
    """A signer name of PodCertificateRequests, and the issuer that signs them."""

    name: str = CERTMOUNT_SIGNER
    issuer: str = DEFAULT_ISSUER


def parse_pod_signer(text: str) -> PodSigner:
    """Return the signer in ``SIGNER`` or ``SIGNER=ISSUER``; raises ValueError."""
    name, separator, issuer = text.partition("=")
    try:
        return PodSigner(parse_signer(name), parse_dns_label(issuer) if separator else DEFAULT_ISSUER)
    except InvalidName as problem:
        raise ValueError(f"{issuer!r} {problem}") from None


class RequestClient(Protocol):
    """PodCertificateRequests at the API server."""

    async def find_version(self) -> str:
        """Return the version of the API to use from now on, or "" if the API server does not serve it."""

    def watch(self, signer: str, sink: RequestCache) -> WatchTask:
        """Return a watch of the requests for a signer that updates ``sink``."""

    async def finish(self, request: PodCertificateRequest, decision: PodCertificateDecision) -> bool:
        """Write the decision; return False if the request is already finished or deleted."""


class BundleClient(Protocol):
    """The ClusterTrustBundles of one signer."""

    async def version(self) -> str:
        """Return the version of the API to use, or "" if the API server does not serve it."""

    async def list(self, version: str) -> Sequence[PublishedBundle]: ...

    async def find(self, version: str, root_set: str) -> PublishedBundle | None: ...

    async def write(self, version: str, bundle: PublishedBundle) -> None:
        """Create or replace the bundle; raises Conflict if another client changed it."""

    async def delete(self, version: str, root_set: str) -> None: ...


@dataclass(frozen=True, slots=True)
class PodCertificateApi:
    """The clients of the signer."""

    requests: RequestClient
    bundles: Callable[[str], BundleClient]  # of a signer name
    find_pod: FindPod
    config_maps: RootConfigMapWriter
    namespaces: Callable[[], Sequence[str]]  # returns those with the label ROOTS_LABEL
    lease: LeaseStore  # of the replica that signs
    holder: str  # the unique name of this replica
