"""The pod that owns a volume, and the pod's service account token."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from csi_driver.core.identity import PodIdentity
from csi_driver.core.secret import Secret
from csi_driver.core.variables import pod_variables


@dataclass(frozen=True, slots=True)
class Pod:
    """A pod as the kubelet identifies it."""

    namespace: str
    name: str
    uid: str
    service_account: str

    def __str__(self) -> str:
        return f"{self.namespace}/{self.name}"

    def variables(self, node_name: str) -> Mapping[str, str]:
        """Return the values of the variables in volume attributes."""
        return pod_variables(
            namespace=self.namespace,
            name=self.name,
            uid=self.uid,
            service_account=self.service_account,
            node=node_name,
        )

    @property
    def tenant(self) -> tuple[str]:
        """The owner of shares that only the namespaces of this node divide."""
        return (f"namespace {self.namespace}",)

    @property
    def owners(self) -> tuple[str, ...]:
        """The owners of the pod's resources on this node, the largest first; see :mod:`csi_driver.core.shares`."""
        return (*account_owners(self.namespace, self.service_account), f"pod {self}")


def account_owners(namespace: str, service_account: str) -> tuple[str, ...]:
    """Return the owners of what the pods of a service account share, the largest first."""
    return f"namespace {namespace}", f"service account {namespace}/{service_account}"


@dataclass(frozen=True, slots=True)
class PodToken:
    """The service account token of a pod, and its claims. The node does not verify the token; the authority does."""

    text: Secret[str]
    claims: PodIdentity
