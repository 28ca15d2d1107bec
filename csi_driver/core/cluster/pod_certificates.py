"""PodCertificateRequests of the Kubernetes API (certificates.k8s.io/v1, KEP-4317)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from datetime import timedelta

ISSUED, DENIED = "Issued", "Denied"
UNSUPPORTED_KEY_TYPE = "UnsupportedKeyType"
INVALID_ANNOTATIONS = "InvalidUnverifiedUserAnnotations"
"""Reasons of the condition Denied that the API defines."""
MIN_LIFETIME = timedelta(hours=1)
"""The API server rejects a certificate with a shorter lifetime."""
REFRESH_MARGIN_S = 600.0
"""The API server requires beginRefreshAt to be this long after notBefore and before notAfter."""


@dataclass(frozen=True, slots=True)
class PodCertificateRequest:
    """A request on the API server. The kubelet creates it, but another client with the permission can do so, too."""

    namespace: str
    name: str
    uid: str
    version: str  # the resourceVersion
    signer: str
    pod_name: str
    pod_uid: str
    service_account: str
    node_name: str
    max_lifetime: timedelta
    csr: bytes  # PKCS#10, DER; empty if the request contains only a public key
    public_key: bytes = b""  # SubjectPublicKeyInfo, DER, whose possession the API server has verified; v1beta1 only
    annotations: Mapping[str, str] | None = None  # unverifiedUserAnnotations; None if they are too large
    finished: bool = False  # the request is issued, denied or failed

    @property
    def key(self) -> str:
        """Its name in the cluster."""
        return f"{self.namespace}/{self.name}"

    @property
    def turn(self) -> str:
        """The tenant that takes turns with others."""
        return self.namespace


@dataclass(frozen=True, slots=True)
class PodCertificateDecision:
    """What the signer writes to the status, once. Times are Unix seconds; they are set if ``kind`` is Issued."""

    kind: str  # Issued, Denied or Failed
    reason: str
    message: str
    chain: str = ""  # PEM: the leaf, then its intermediates
    not_before: int = 0
    begin_refresh_at: int = 0
    not_after: int = 0


@dataclass(frozen=True, slots=True)
class PublishedBundle:
    """A ClusterTrustBundle of certmount. ``name`` is the name of the root set."""

    name: str
    generation: int
    roots: str  # PEM
    version: str = ""  # the resourceVersion
