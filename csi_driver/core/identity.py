"""The identities for which certificates are issued, pods and Secrets, and the claims of service account tokens."""

from __future__ import annotations

import base64
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Self, TypeAlias

from csi_driver.core.errors import CertmountError, Fault, Reason
from csi_driver.core.secret import Secret

MAX_TOKEN_BYTES = 16 * 1024
SERVICE_ACCOUNT_USER = "system:serviceaccount:"  # the start of a user name in Kubernetes, before NAMESPACE:NAME
TOKEN_FIELD = "authentication.kubernetes.io/"  # the start of the fields of a user that come from its token
# The names that the API server allows (RFC 1123). They become parts of URIs, paths and logs.
_NAMESPACE = re.compile(r"[a-z0-9](?:[a-z0-9-]{0,61}[a-z0-9])?", re.ASCII)
_NAME = re.compile(r"(?!.{254})[a-z0-9](?:[a-z0-9-]*[a-z0-9])?(?:\.[a-z0-9](?:[a-z0-9-]*[a-z0-9])?)*", re.ASCII)
_UID = re.compile(r"[A-Za-z0-9._-]{1,128}", re.ASCII)
_BASE64URL = re.compile(r"[A-Za-z0-9_-]*", re.ASCII)
_MAX_TIME = 1e12  # Unix seconds, about 30,000 years from now


@dataclass(frozen=True, slots=True)
class ServiceAccount:
    """The namespace and name of a service account."""

    namespace: str
    name: str

    @property
    def username(self) -> str:
        """The user name in Kubernetes."""
        return f"{SERVICE_ACCOUNT_USER}{self.namespace}:{self.name}"

    @property
    def label(self) -> str:
        """What errors and shares call it."""
        return f"service account {self}"

    def __str__(self) -> str:
        return f"{self.namespace}/{self.name}"


@dataclass(frozen=True, slots=True)
class SecretIdentity:
    """A Secret that the Secrets controller keeps valid. The controller's token authenticates it."""

    namespace: str
    name: str

    @classmethod
    def parse(cls, namespace: str, name: str) -> Self:
        """Return the identity; raises ValueError, in words that follow the names."""
        if not (_NAMESPACE.fullmatch(namespace) and _NAME.fullmatch(name)):
            raise ValueError("is not the namespace and name of a Secret")
        return cls(namespace, name)

    @property
    def principal(self) -> SecretIdentity:
        return self

    @property
    def tenants(self) -> tuple[str, str]:
        """As :attr:`PodIdentity.tenants`."""
        return f"namespace {self.namespace}", self.label

    @property
    def owners(self) -> tuple[str, ...]:
        """As :attr:`PodIdentity.owners`. The controller has a share too, so that Secrets do not crowd out volumes."""
        return "the Secrets controller", *self.tenants

    @property
    def label(self) -> str:
        """As :attr:`ServiceAccount.label`."""
        return f"secret {self.namespace}/{self.name}"

    def __str__(self) -> str:
        return self.label


Principal: TypeAlias = "ServiceAccount | SecretIdentity"
"""Whom policy rules match, and who owns what is requested."""


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

    @property
    def principal(self) -> ServiceAccount:
        return self.service_account

    @property
    def tenants(self) -> tuple[str, str]:
        """The owners of what it requests, the largest first, without the node: its pods can be those of any tenant."""
        return f"namespace {self.service_account.namespace}", self.service_account.label

    @property
    def owners(self) -> tuple[str, ...]:
        """The owners of what it requests, the largest first."""
        return f"node {self.node_name}", *self.tenants

    def __str__(self) -> str:
        return f"pod {self.service_account.namespace}/{self.pod_name}"


Requester: TypeAlias = "PodIdentity | SecretIdentity"
"""For what a certificate is issued."""


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
    text = token.reveal()
    parts = text.split(".", 3) if len(text) <= MAX_TOKEN_BYTES else ()
    if len(parts) != 3:
        raise _rejected("is not a JSON Web Token")
    try:
        claims = json.loads(decode_base64url(parts[1]))
    except (ValueError, RecursionError):
        raise _rejected("has invalid claims") from None
    if not isinstance(claims, dict):
        raise _rejected("has claims that are not an object")
    return identity_from_claims(claims, token="pod token")


def decode_base64url(text: str) -> bytes:
    """Decode a part of a token (RFC 7515 section 2); raises ValueError. Python versions differ in what else they accept."""
    if not _BASE64URL.fullmatch(text):
        raise ValueError("is not base64url")
    return base64.urlsafe_b64decode(text + "=" * (-len(text) % 4))


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
