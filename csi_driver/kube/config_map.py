"""The root certificate in a ConfigMap, from where the node drivers mount it."""

from __future__ import annotations

from kubernetes.aio import client

from csi_driver.core.errors import Reason
from csi_driver.kube.client import TIMEOUT_S, Conflict, ObjectName, answered

_KEY = "root.crt"


class ConfigMapPublisher:
    """One ConfigMap that the manifests have made; all of it but its ``root.crt`` is left as it is."""

    def __init__(self, api: client.ApiClient, config_map: ObjectName) -> None:
        self._api = client.CoreV1Api(api)
        self._name = config_map

    async def publish(self, pem: bytes) -> None:
        """Writes the roots unless they are there; raises CertmountError TrustMissing."""
        try:
            await self._publish(pem.decode("ascii"))
        except Conflict:
            # Another replica has most likely written the same; if not, this time decides.
            await self._publish(pem.decode("ascii"))

    async def _publish(self, pem: str) -> None:
        namespace, name = self._name.namespace, self._name.name
        reading = self._api.read_namespaced_config_map(name, namespace, _request_timeout=TIMEOUT_S)
        config_map = await answered(reading, Reason.TRUST_MISSING, str(self._name))
        if (config_map.data or {}).get(_KEY) == pem:
            return
        config_map.data = {**(config_map.data or {}), _KEY: pem}
        writing = self._api.replace_namespaced_config_map(name, namespace, config_map, _request_timeout=TIMEOUT_S)
        await answered(writing, Reason.TRUST_MISSING, str(self._name))
