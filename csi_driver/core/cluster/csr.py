"""A CertificateSigningRequest of the Kubernetes API (certificates.k8s.io/v1), as the authority's parts hand it to each other."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field

from csi_driver.core.spec import Usage

OWN_SIGNER = "certmount.dev/pod"
"""The signer that the authority itself is."""
LEAST_SECONDS = 600
"""The shortest life that the API lets anyone ask for (KEP-2784)."""
APPROVED, DENIED, FAILED = "Approved", "Denied", "Failed"

DIGITAL_SIGNATURE, KEY_ENCIPHERMENT = "digital signature", "key encipherment"
PURPOSES = {Usage.SERVER: "server auth", Usage.CLIENT: "client auth"}
# The API server wants a domain and a path, and takes no more than 571 characters (ValidateCertificateSigningRequest).
_SIGNER = re.compile(
    r"(?=.{3,571}\Z)[a-z0-9](?:[a-z0-9.-]*[a-z0-9])?\.[a-z0-9-]+/[A-Za-z0-9](?:[A-Za-z0-9._:-]*[A-Za-z0-9])?", re.ASCII
)


@dataclass(frozen=True, slots=True)
class CSRCondition:
    """What someone has decided on a request, in the API's words: Approved, Denied or Failed."""

    kind: str
    reason: str
    message: str

    def __str__(self) -> str:
        return f"{self.reason}: {self.message}" if self.message else self.reason


@dataclass(frozen=True, slots=True)
class CSRDraft:
    """A request that is to be made."""

    name_prefix: str
    signer: str
    request: bytes
    """PEM."""
    usages: tuple[str, ...]
    life_s: int
    labels: Mapping[str, str]
    annotations: Mapping[str, str]


@dataclass(frozen=True, slots=True)
class ClusterCSR:
    """A request as the API server has it. All but conditions and certificate never changes, and the requester is stamped."""

    name: str
    uid: str
    created_at: float
    """Unix seconds."""
    signer: str
    request: bytes
    """What should be PEM, as the requester gave it."""
    usages: tuple[str, ...]
    life_s: int | None
    username: str
    extra: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    labels: Mapping[str, str] = field(default_factory=dict)
    conditions: tuple[CSRCondition, ...] = ()
    certificate: bytes = b""
    """PEM: the leaf, then its intermediates; empty while there is none."""

    def condition(self, kind: str) -> CSRCondition | None:
        return next((one for one in self.conditions if one.kind == kind), None)

    @property
    def refusal(self) -> CSRCondition | None:
        """Why there will be no certificate; None while there may still be one."""
        return self.condition(DENIED) or self.condition(FAILED)

    @property
    def finished(self) -> bool:
        """True when nobody will do anything more about it."""
        return bool(self.certificate) or self.refusal is not None


def parse_signer(text: str) -> str:
    """Takes the name of a signer, or raises ValueError in words for whoever wrote it."""
    if not _SIGNER.fullmatch(text):
        raise ValueError("is not the name of a signer, such as example.com/signer")
    if f".{text.partition('/')[0]}".endswith(".kubernetes.io"):
        raise ValueError(
            "is a signer of Kubernetes itself, which signs for nodes and clients of the API server, not for pods"
        )
    return text
