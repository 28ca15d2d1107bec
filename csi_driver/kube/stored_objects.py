"""Single objects that the manifests create and the authority updates: Secrets, the roots ConfigMap, and Leases.

Each needs only the verbs get and update on its one name.
"""

from __future__ import annotations

import base64
import binascii
from collections.abc import Callable, Mapping
from datetime import UTC, datetime

from csi_driver.core.cluster.objects import Lease
from csi_driver.core.errors import CertmountError, Fault, Reason
from csi_driver.core.secret import Secret, StoredSecrets
from csi_driver.kube.client import Conflict, ObjectName, call_api, invalid_response
from csi_driver.kube.connection import Api
from csi_driver.kube.json_requests import request_json
from csi_driver.kube.metadata import Json

MAX_STORED_BYTES = 3 * 2**20
"""Kubernetes limits the data of a Secret and of a ConfigMap to 1 MiB. Only administrators can write these objects."""
_ROOTS, _AUTHORITY = "root.crt", "authority.crt"
_GROUPS = {"Lease": "/apis/coordination.k8s.io/v1"}


class StoredObject:
    """One object, with compare-and-swap updates."""

    def __init__(self, api: Api, name: ObjectName, reason: Reason) -> None:
        self._api = api
        self._path = object_path(name)
        self._reason = reason
        self.name = str(name)

    async def read(self) -> Json:
        return await self._request("GET")

    async def update(self, change: Callable[[Json], bool]) -> bool:
        """Read the object, apply ``change`` to it, and write it.

        Return False if ``change`` returned False, so that nothing was written. Raises CertmountError; Conflict if another
        client changed the object between the read and the write.
        """
        item = await self.read()
        if not change(item):
            return False
        await self._request("PUT", item)
        return True

    async def update_if_unchanged(self, version: str, change: Callable[[Json], None]) -> bool:
        """Update the object if it still has this resourceVersion; return False if another client changed it."""

        def change_version(item: Json) -> bool:
            if self.version(item) != version:
                return False
            change(item)
            return True

        try:
            return await self.update(change_version)
        except Conflict:
            return False

    def version(self, item: Json) -> str:
        metadata = item.get("metadata")
        if not isinstance(metadata, dict) or not metadata.get("resourceVersion"):
            raise self.invalid()
        return str(metadata["resourceVersion"])

    def invalid(self) -> CertmountError:
        return invalid_response(self._reason, self.name)

    async def _request(self, method: str, body: Json | None = None) -> Json:
        call = request_json(self._api, method, self._path, body=body, max_bytes=MAX_STORED_BYTES)
        return await call_api(call, self._reason, self.name)


class SecretStore:
    """The values of a Secret; implements :class:`csi_driver.core.secret.StoredSecrets`."""

    def __init__(self, api: Api, secret: ObjectName) -> None:
        self._object = StoredObject(api, secret, Reason.ISSUER_UNAVAILABLE)
        self.name = str(secret)

    async def load(self) -> StoredSecrets:
        """Return the values; raises CertmountError IssuerUnavailable, or InvalidCA if a value is not base64."""
        item = await self._object.read()
        try:
            values = {
                str(key): Secret(base64.b64decode(value or "", validate=True))
                for key, value in (item.get("data") or {}).items()
            }
        except binascii.Error:
            raise CertmountError(Reason.INVALID_CA, Fault(self.name, "a value is not valid base64")) from None
        except (AttributeError, TypeError, ValueError):
            raise self._object.invalid() from None
        return StoredSecrets(values, self._object.version(item))

    async def save(self, values: Mapping[str, Secret[bytes]], based_on: StoredSecrets) -> bool:
        """Replace the Secret's data only; return False if another client changed the Secret."""

        def change(item: Json) -> None:
            item["data"] = {key: base64.b64encode(value.reveal()).decode("ascii") for key, value in values.items()}

        return await self._object.update_if_unchanged(based_on.version, change)


class ConfigMapPublisher:
    """The keys ``root.crt`` and ``authority.crt`` of the ConfigMap that node drivers mount."""

    def __init__(self, api: Api, config_map: ObjectName) -> None:
        self._object = StoredObject(api, config_map, Reason.ROOT_CERTIFICATE_MISSING)

    async def publish(self, roots: bytes, authority: bytes) -> None:
        """Write the roots that pods trust and the root of the authority's server certificate (PEM), if they changed.

        Raises CertmountError RootCertificateMissing.
        """
        data = {_ROOTS: roots.decode("ascii"), _AUTHORITY: authority.decode("ascii")}

        def change(item: Json) -> bool:
            present = item.get("data") or {}
            item["data"] = {**present, **data}
            return not data.items() <= present.items()

        try:
            await self._object.update(change)
        except Conflict:
            # Another replica probably wrote the same data. If not, the second attempt wins.
            await self._object.update(change)


class LeaseClient:
    """A Lease, which selects one of several replicas."""

    def __init__(self, api: Api, lease: ObjectName) -> None:
        self._object = StoredObject(api, lease, Reason.ISSUER_UNAVAILABLE)
        self.name = str(lease)

    async def load(self) -> Lease:
        item = await self._object.read()
        try:
            spec = item.get("spec") or {}
            holder, seconds = str(spec.get("holderIdentity") or ""), int(spec.get("leaseDurationSeconds") or 0)
        except (TypeError, ValueError, AttributeError):
            raise self._object.invalid() from None
        return Lease(holder, seconds, self._object.version(item))

    async def save(self, lease: Lease) -> bool:
        def change(item: Json) -> None:
            now = f"{datetime.now(UTC):%Y-%m-%dT%H:%M:%S.%fZ}"
            spec = item.get("spec") or {}
            if lease.holder != (spec.get("holderIdentity") or ""):
                spec["leaseTransitions"] = int(spec.get("leaseTransitions") or 0) + 1
                spec["acquireTime"] = now
            spec |= {"holderIdentity": lease.holder, "leaseDurationSeconds": lease.seconds, "renewTime": now}
            item["spec"] = spec

        return await self._object.update_if_unchanged(lease.version, change)


def object_path(name: ObjectName) -> str:
    """Return the API path of a Secret, ConfigMap or Lease."""
    group = _GROUPS.get(name.kind, "/api/v1")
    return f"{group}/namespaces/{name.namespace}/{name.kind.lower()}s/{name.name}"
