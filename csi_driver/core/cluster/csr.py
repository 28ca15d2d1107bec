"""CertificateSigningRequests of the Kubernetes API (certificates.k8s.io/v1)."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field

from csi_driver.core.spec import Usage

CERTMOUNT_SIGNER = "certmount.dev/pod"  # the signer name that the authority implements
MIN_EXPIRATION_S = 600  # the shortest lifetime that the API accepts (KEP-2784)
APPROVED, DENIED, FAILED = "Approved", "Denied", "Failed"

DIGITAL_SIGNATURE, KEY_ENCIPHERMENT = "digital signature", "key encipherment"
PURPOSES = {Usage.SERVER: "server auth", Usage.CLIENT: "client auth"}
# The API server requires a domain and a path, 571 characters at most (ValidateCertificateSigningRequest).
_SIGNER = re.compile(
    r"(?=.{3,571}\Z)[a-z0-9](?:[a-z0-9.-]*[a-z0-9])?\.[a-z0-9-]+/[A-Za-z0-9](?:[A-Za-z0-9._:-]*[A-Za-z0-9])?", re.ASCII
)


@dataclass(frozen=True, slots=True)
class CSRCondition:
    """A condition of a request. ``kind`` is Approved, Denied or Failed."""

    kind: str
    reason: str
    message: str

    def __str__(self) -> str:
        return f"{self.reason}: {self.message}" if self.message else self.reason


@dataclass(frozen=True, slots=True)
class CSRDraft:
    """A request to create."""

    name_prefix: str
    signer: str
    request: bytes  # PEM
    usages: tuple[str, ...]
    expiration_s: int
    labels: Mapping[str, str]
    annotations: Mapping[str, str]


@dataclass(frozen=True, slots=True)
class ClusterCSR:
    """A request on the API server, which records the requester. Only conditions and certificate can change."""

    name: str
    uid: str
    created_at: float  # Unix seconds
    signer: str
    request: bytes  # the requester's bytes; they should be PEM
    usages: tuple[str, ...]
    expiration_s: int | None
    username: str
    extra: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    labels: Mapping[str, str] = field(default_factory=dict)
    conditions: tuple[CSRCondition, ...] = ()
    certificate: bytes = b""  # PEM: the leaf, then the intermediates; empty until the request is signed

    @property
    def key(self) -> str:
        return self.name

    @property
    def turn(self) -> str:
        """The namespace of the requester: namespaces take turns."""
        return self.username.rpartition(":")[0]

    def condition(self, kind: str) -> CSRCondition | None:
        return next((condition for condition in self.conditions if condition.kind == kind), None)

    @property
    def rejection(self) -> CSRCondition | None:
        """The Denied or Failed condition; None if the request can still be signed."""
        return self.condition(DENIED) or self.condition(FAILED)

    @property
    def finished(self) -> bool:
        """True if the request is signed or rejected."""
        return bool(self.certificate) or self.rejection is not None


def parse_signer(text: str) -> str:
    """Return a valid signer name; raises ValueError."""
    if not _SIGNER.fullmatch(text):
        raise ValueError("is not a signer name, such as example.com/signer")
    if f".{text.partition('/')[0]}".endswith(".kubernetes.io"):
        raise ValueError("is a signer of Kubernetes itself, for nodes and API clients; use a signer for pods")
    return text
