"""The ConfigMap ``certmount-roots`` of a namespace, created by server-side apply: a role can then name it."""

from __future__ import annotations

from collections.abc import Mapping

from csi_driver.core.errors import Reason
from csi_driver.kube.client import NotFound, call_api
from csi_driver.kube.connection import Api
from csi_driver.kube.json_requests import APPLY_PATCH, MERGE_PATCH, request_bytes
from csi_driver.kube.metadata import MANAGED, MANAGER
from csi_driver.kube.stored_objects import MAX_STORED_BYTES

ROOT_CONFIG_MAP = "certmount-roots"


class RootConfigMapClient:
    """Needs the verbs create and patch on the one name, in each namespace where it writes."""

    def __init__(self, api: Api) -> None:
        self._api = api

    async def write(self, namespace: str, data: Mapping[str, str | None]) -> None:
        """Create or update the ConfigMap. None removes a key, and keys that are not named stay.

        Raises CertmountError IssuerUnavailable.
        """
        try:
            await self._patch(namespace, data, MERGE_PATCH)
        except NotFound:
            known = {key: content for key, content in data.items() if content is not None}
            await self._patch(namespace, known, APPLY_PATCH, "&force=true")

    async def _patch(self, namespace: str, data: Mapping[str, str | None], kind: str, options: str = "") -> None:
        metadata = {"name": ROOT_CONFIG_MAP, "namespace": namespace, "labels": MANAGED}
        body = {"apiVersion": "v1", "kind": "ConfigMap", "metadata": metadata, "data": dict(data)}
        path = f"/api/v1/namespaces/{namespace}/configmaps/{ROOT_CONFIG_MAP}?fieldManager={MANAGER}{options}"
        headers = {"Content-Type": kind}
        call = request_bytes(self._api, "PATCH", path, body=body, headers=headers, max_bytes=MAX_STORED_BYTES)
        await call_api(call, Reason.ISSUER_UNAVAILABLE, f"ConfigMap {namespace}/{ROOT_CONFIG_MAP}")
