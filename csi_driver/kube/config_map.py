"""The roots in a ConfigMap, from where the node drivers mount them."""

from __future__ import annotations

from collections.abc import Mapping

from kubernetes.aio import client

from csi_driver.core.errors import Reason
from csi_driver.kube.client import TIMEOUT_S, Conflict, ObjectName, answered

_ROOTS, _AUTHORITY = "root.crt", "authority.crt"


class ConfigMapPublisher:
    """One ConfigMap that the manifests have made; all of it but its ``root.crt`` and ``authority.crt`` is left as it is."""

    def __init__(self, api: client.ApiClient, config_map: ObjectName) -> None:
        self._api = client.CoreV1Api(api)
        self._name = config_map

    async def publish(self, roots: bytes, authority: bytes) -> None:
        """Writes what pods trust and what the authority shows (PEM), both at once, unless they are there.

        Raises:
            CertmountError: RootCertificateMissing.
        """
        data = {_ROOTS: roots.decode("ascii"), _AUTHORITY: authority.decode("ascii")}
        try:
            await self._publish(data)
        except Conflict:
            # Another replica has most likely written the same; if not, this time decides.
            await self._publish(data)

    async def _publish(self, data: Mapping[str, str]) -> None:
        namespace, name = self._name.namespace, self._name.name
        reading = self._api.read_namespaced_config_map(name, namespace, _request_timeout=TIMEOUT_S)
        config_map = await answered(reading, Reason.ROOT_CERTIFICATE_MISSING, str(self._name))
        present = config_map.data or {}
        if data.items() <= present.items():
            return
        config_map.data = {**present, **data}
        writing = self._api.replace_namespaced_config_map(name, namespace, config_map, _request_timeout=TIMEOUT_S)
        await answered(writing, Reason.ROOT_CERTIFICATE_MISSING, str(self._name))
