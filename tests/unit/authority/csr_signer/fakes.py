"""Pods and a lease in memory."""

from __future__ import annotations

from dataclasses import dataclass, field

from csi_driver.core.cluster.objects import Lease, LivePod
from csi_driver.core.errors import CertmountError, Reason


@dataclass
class FakePods:
    """Pods by namespace and name."""

    pods: dict[tuple[str, str], LivePod] = field(default_factory=dict)

    async def find(self, namespace: str, name: str) -> LivePod | None:
        return self.pods.get((namespace, name))


@dataclass
class FakeLease:
    """A lease in memory."""

    lease: Lease = Lease("", 0, "1")
    unavailable: bool = False

    async def load(self) -> Lease:
        if self.unavailable:
            raise CertmountError(Reason.ISSUER_UNAVAILABLE, "the API server cannot be reached")
        return self.lease

    async def save(self, lease: Lease) -> bool:
        found = await self.load()
        if lease.version != found.version:
            return False
        self.lease = Lease(lease.holder, lease.seconds, str(int(found.version) + 1))
        return True
