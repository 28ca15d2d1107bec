"""Who asks: what a service-account token says of its pod, and what it must say to be believed."""

from __future__ import annotations

import base64
import binascii
import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from csi_driver.core.errors import CertmountError, Fault, Reason
from csi_driver.core.secret import Secret

MAX_TOKEN_BYTES = 16 * 1024


@dataclass(frozen=True, slots=True)
class ServiceAccount:
    """A service account by namespace and name."""

    namespace: str
    name: str

    @property
    def username(self) -> str:
        """The user name that Kubernetes gives it."""
        return f"system:serviceaccount:{self.namespace}:{self.name}"

    def __str__(self) -> str:
        return f"{self.namespace}/{self.name}"


@dataclass(frozen=True, slots=True)
class PodIdentity:
    """A pod as its bound token names it (Kubernetes 1.30 and newer: KEP-4193 adds the node)."""

    service_account: ServiceAccount
    service_account_uid: str
    pod_name: str
    pod_uid: str
    node_name: str
    node_uid: str
    expires_at: float
    """Unix seconds; after it the token proves nothing."""

    def __str__(self) -> str:
        return f"pod {self.service_account.namespace}/{self.pod_name}"


def identity_from_claims(claims: Mapping[str, Any], *, token: str) -> PodIdentity:
    """Reads the claims of a projected token; ``token`` says which one in errors ("pod token", "node token").

    Raises:
        CertmountError: IdentityRefused for a token that is not bound to a pod,
            ClusterUnsupported for one that does not name its node (Kubernetes before 1.30).
    """
    bound = claims.get("kubernetes.io")
    bound = bound if isinstance(bound, Mapping) else {}
    namespace = bound.get("namespace")
    account = _named(bound.get("serviceaccount"))
    pod = _named(bound.get("pod"))
    node = _named(bound.get("node"))
    expires_at = claims.get("exp")
    if not (isinstance(namespace, str) and namespace and account and pod and isinstance(expires_at, int | float)):
        problem = "is not a projected service-account token that is bound to a pod"
        raise CertmountError(Reason.IDENTITY_REFUSED, Fault(token, problem))
    service_account = ServiceAccount(namespace, account[0])
    if claims.get("sub") != service_account.username:
        raise CertmountError(
            Reason.IDENTITY_REFUSED, Fault(token, "names one service account as subject and another in its claims")
        )
    if node is None:
        problem = "does not name the pod's node"
        raise CertmountError(
            Reason.CLUSTER_UNSUPPORTED, Fault(token, problem, "certmount needs Kubernetes 1.30 or newer")
        )
    return PodIdentity(service_account, account[1], pod[0], pod[1], node[0], node[1], float(expires_at))


def unverified_identity(token: Secret[str]) -> PodIdentity:
    """What a token claims, unchecked: for the node to see that kubelet passed the right pod's token, never for trust.

    Raises:
        CertmountError: IdentityRefused or ClusterUnsupported, as :func:`identity_from_claims`.
    """
    parts = token.reveal().split(".")
    if len(parts) != 3 or len(token.reveal()) > MAX_TOKEN_BYTES:
        raise CertmountError(Reason.IDENTITY_REFUSED, Fault("pod token", "is not a JSON Web Token"))
    try:
        claims = json.loads(base64.urlsafe_b64decode(parts[1] + "=" * (-len(parts[1]) % 4)))
    except (ValueError, binascii.Error, RecursionError):
        raise CertmountError(Reason.IDENTITY_REFUSED, Fault("pod token", "has claims that cannot be read")) from None
    if not isinstance(claims, dict):
        raise CertmountError(Reason.IDENTITY_REFUSED, Fault("pod token", "has claims that are not an object"))
    return identity_from_claims(claims, token="pod token")


def _named(value: object) -> tuple[str, str] | None:
    """The (name, uid) pair of a claim, both non-empty strings."""
    if not isinstance(value, Mapping):
        return None
    name, uid = value.get("name"), value.get("uid")
    return (name, uid) if isinstance(name, str) and isinstance(uid, str) and name and uid else None
