"""The pod that owns a volume, and the pod's service account token."""

from __future__ import annotations

from dataclasses import dataclass

from csi_driver.core.identity import PodIdentity
from csi_driver.core.secret import Secret


@dataclass(frozen=True, slots=True)
class Pod:
    """A pod as the kubelet identifies it."""

    namespace: str
    name: str
    uid: str
    service_account: str

    def __str__(self) -> str:
        return f"{self.namespace}/{self.name}"


@dataclass(frozen=True, slots=True)
class PodToken:
    """The service account token of a pod, and its claims. The node does not verify the token; the authority does."""

    text: Secret[str]
    claims: PodIdentity
