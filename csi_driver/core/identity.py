"""Pod identities, and the claims of service account tokens."""

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
# The names that the API server allows (RFC 1123). They become parts of URIs, paths and logs.
_NAMESPACE = re.compile(r"[a-z0-9](?:[a-z0-9-]{0,61}[a-z0-9])?", re.ASCII)
_NAME = re.compile(r"(?!.{254})[a-z0-9](?:[a-z0-9-]*[a-z0-9])?(?:\.[a-z0-9](?:[a-z0-9-]*[a-z0-9])?)*", re.ASCII)
_UID = re.compile(r"[A-Za-z0-9._-]{1,128}", re.ASCII)
_MAX_TIME = 1e12  # Unix seconds, about 30,000 years from now


@dataclass(frozen=True, slots=True)
class ServiceAccount:
    """The namespace and name of a service account."""

    namespace: str
    name: str

    @property
    def username(self) -> str:
        """The user name in Kubernetes."""
        return f"system:serviceaccount:{self.namespace}:{self.name}"

    def __str__(self) -> str:
        return f"{self.namespace}/{self.name}"


@dataclass(frozen=True, slots=True)
class PodIdentity:
    """A pod, as its bound token describes it (with the node since Kubernetes 1.30, KEP-4193)."""

    service_account: ServiceAccount
    service_account_uid: str
    pod_name: str
    pod_uid: str
    node_name: str
    node_uid: str
    expires_at: float  # the expiry of the token in Unix seconds

    def __str__(self) -> str:
        return f"pod {self.service_account.namespace}/{self.pod_name}"


def identity_from_claims(claims: Mapping[str, Any], *, token: str) -> PodIdentity:
    """Return the identity in the claims of a projected token; ``token`` names it in errors ("pod token", "node token").

    Raises:
        CertmountError: TokenRejected if the token is not bound to a pod, ClusterNotSupported if it does not contain the
            node (Kubernetes before 1.30).
    """
    bound = claims.get("kubernetes.io")
    bound = bound if isinstance(bound, Mapping) else {}
    namespace = _text(bound.get("namespace"), _NAMESPACE)
    account = _object(bound.get("serviceaccount"))
    pod = _object(bound.get("pod"))
    node = _object(bound.get("node"))
    expires_at = _unix_seconds(claims.get("exp"))
    if not (namespace and account and pod and expires_at):
        raise _rejected("is not a projected service account token that is bound to a pod", token)
    service_account = ServiceAccount(namespace, account[0])
    if claims.get("sub") != service_account.username:
        raise _rejected("has different service accounts in its subject and its other claims", token)
    if node is None:
        fault = Fault(token, "does not contain the pod's node", "use Kubernetes 1.30 or newer")
        raise CertmountError(Reason.CLUSTER_NOT_SUPPORTED, fault)
    return PodIdentity(service_account, account[1], pod[0], pod[1], node[0], node[1], expires_at)


def unverified_identity(token: Secret[str]) -> PodIdentity:
    """Return the claimed identity without verification, so that the node can check for a mix-up of pods. Do not trust it.

    Raises:
        CertmountError: as :func:`identity_from_claims`.
    """
    parts = token.reveal().split(".")
    if len(parts) != 3 or len(token.reveal()) > MAX_TOKEN_BYTES:
        raise _rejected("is not a JSON Web Token")
    try:
        claims = json.loads(base64.urlsafe_b64decode(parts[1] + "=" * (-len(parts[1]) % 4)))
    except (ValueError, binascii.Error, RecursionError):
        raise _rejected("has invalid claims") from None
    if not isinstance(claims, dict):
        raise _rejected("has claims that are not an object")
    return identity_from_claims(claims, token="pod token")


def _rejected(problem: str, token: str = "pod token") -> CertmountError:
    return CertmountError(Reason.TOKEN_REJECTED, Fault(token, problem))


def _object(value: object) -> tuple[str, str] | None:
    """Return the name and UID in a claim, if both are valid."""
    if not isinstance(value, Mapping):
        return None
    name, uid = _text(value.get("name"), _NAME), _text(value.get("uid"), _UID)
    return (name, uid) if name and uid else None


def _unix_seconds(value: object) -> float | None:
    """Return Unix seconds. Python's JSON parser also accepts NaN, infinity and integers that exceed a float."""
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < _MAX_TIME:
        return None
    return float(value)


def _text(value: object, pattern: re.Pattern[str]) -> str | None:
    return value if isinstance(value, str) and pattern.fullmatch(value) else None
