"""A Lease (coordination.k8s.io/v1): which of several replicas does what only one should do."""

from __future__ import annotations

from datetime import UTC, datetime

from kubernetes.aio import client

from csi_driver.core.cluster.lease import Lease
from csi_driver.core.errors import CertmountError, Fault, Reason
from csi_driver.kube.client import Conflict, ObjectName, answered
from csi_driver.kube.metadata import Json
from csi_driver.kube.requests import ask


class ClusterLease:
    """One that the manifests have made: get and update on its one name are all that is needed."""

    def __init__(self, api: client.ApiClient, lease: ObjectName) -> None:
        self._api = api
        self._path = f"/apis/coordination.k8s.io/v1/namespaces/{lease.namespace}/leases/{lease.name}"
        self.name = str(lease)

    async def load(self) -> Lease:
        """Who holds it; raises CertmountError IssuerUnavailable."""
        return _read(await self._read(), self.name)

    async def save(self, lease: Lease) -> bool:
        """Writes the holder and that it renewed just now; False where another one has written since the lease was read."""
        item = await self._read()
        if _read(item, self.name).version != lease.version:
            return False
        now = datetime.now(UTC)
        spec = item.get("spec") or {}
        if lease.holder != (spec.get("holderIdentity") or ""):
            spec["leaseTransitions"] = int(spec.get("leaseTransitions") or 0) + 1
            spec["acquireTime"] = _micro_time(now)
        item["spec"] = {
            **spec,
            "holderIdentity": lease.holder,
            "leaseDurationSeconds": lease.seconds,
            "renewTime": _micro_time(now),
        }
        try:
            await self._ask("PUT", item)
        except Conflict:
            return False
        return True

    async def _read(self) -> Json:
        return await self._ask("GET")

    async def _ask(self, method: str, body: Json | None = None) -> Json:
        return await answered(ask(self._api, method, self._path, body=body), Reason.ISSUER_UNAVAILABLE, self.name)


def _read(item: Json, what: str) -> Lease:
    try:
        spec = item.get("spec") or {}
        return Lease(
            holder=str(spec.get("holderIdentity") or ""),
            seconds=int(spec.get("leaseDurationSeconds") or 0),
            version=str(item["metadata"]["resourceVersion"]),
        )
    except (KeyError, TypeError, ValueError, AttributeError):
        raise CertmountError(Reason.ISSUER_UNAVAILABLE, Fault(what, "the API server's answer is strange")) from None


def _micro_time(now: datetime) -> str:
    return f"{now:%Y-%m-%dT%H:%M:%S.%fZ}"
