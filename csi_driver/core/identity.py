"""Who asks: what a service-account token says of its pod, and what it must say to be believed."""

from __future__ import annotations

import base64
import binascii
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from csi_driver.core.errors import CertmountError, Fault, Reason
from csi_driver.core.secret import Secret

MAX_TOKEN_BYTES = 16 * 1024
# What the API server lets a namespace and any other object be called (RFC 1123): names become parts of URIs, paths, logs.
_NAMESPACE = re.compile(r"[a-z0-9](?:[a-z0-9-]{0,61}[a-z0-9])?", re.ASCII)
_NAME = re.compile(r"(?!.{254})[a-z0-9](?:[a-z0-9-]*[a-z0-9])?(?:\.[a-z0-9](?:[a-z0-9-]*[a-z0-9])?)*", re.ASCII)
_UID = re.compile(r"[A-Za-z0-9._-]{1,128}", re.ASCII)
_END_OF_TIME = 1e12
"""Unix seconds, some 30,000 years on."""


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
        CertmountError: TokenRejected for a token that is not bound to a pod,
            ClusterNotSupported for one that does not name its node (Kubernetes before 1.30).
    """
    bound = claims.get("kubernetes.io")
    bound = bound if isinstance(bound, Mapping) else {}
    namespace = _text(bound.get("namespace"), _NAMESPACE)
    account = _named(bound.get("serviceaccount"))
    pod = _named(bound.get("pod"))
    node = _named(bound.get("node"))
    expires_at = _moment(claims.get("exp"))
    if not (namespace and account and pod and expires_at):
        problem = "is not a projected service-account token that is bound to a pod"
        raise CertmountError(Reason.TOKEN_REJECTED, Fault(token, problem))
    service_account = ServiceAccount(namespace, account[0])
    if claims.get("sub") != service_account.username:
        raise CertmountError(
            Reason.TOKEN_REJECTED, Fault(token, "names one service account as subject and another in its claims")
        )
    if node is None:
        problem = "does not name the pod's node"
        raise CertmountError(
            Reason.CLUSTER_NOT_SUPPORTED, Fault(token, problem, "certmount needs Kubernetes 1.30 or newer")
        )
    return PodIdentity(service_account, account[1], pod[0], pod[1], node[0], node[1], expires_at)


def unverified_identity(token: Secret[str]) -> PodIdentity:
    """What a token claims, unchecked: for the node to see that kubelet passed the right pod's token, never for trust.

    Raises:
        CertmountError: TokenRejected or ClusterNotSupported, as :func:`identity_from_claims`.
    """
    parts = token.reveal().split(".")
    if len(parts) != 3 or len(token.reveal()) > MAX_TOKEN_BYTES:
        raise CertmountError(Reason.TOKEN_REJECTED, Fault("pod token", "is not a JSON Web Token"))
    try:
        claims = json.loads(base64.urlsafe_b64decode(parts[1] + "=" * (-len(parts[1]) % 4)))
    except (ValueError, binascii.Error, RecursionError):
        raise CertmountError(Reason.TOKEN_REJECTED, Fault("pod token", "has claims that cannot be read")) from None
    if not isinstance(claims, dict):
        raise CertmountError(Reason.TOKEN_REJECTED, Fault("pod token", "has claims that are not an object"))
    return identity_from_claims(claims, token="pod token")


def _named(value: object) -> tuple[str, str] | None:
    """The (name, uid) pair of a claim, both as the API server writes them."""
    if not isinstance(value, Mapping):
        return None
    name, uid = _text(value.get("name"), _NAME), _text(value.get("uid"), _UID)
    return (name, uid) if name and uid else None


def _moment(value: object) -> float | None:
    """Unix seconds; JSON in Python also knows NaN, infinity and integers that no float holds."""
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < _END_OF_TIME:
        return None
    return float(value)


def _text(value: object, pattern: re.Pattern[str]) -> str | None:
    return value if isinstance(value, str) and pattern.fullmatch(value) else None
