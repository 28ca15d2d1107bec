"""Secret values in a Kubernetes Secret; its resourceVersion keeps two writers from overwriting each other."""

from __future__ import annotations

import base64
import binascii
from collections.abc import Mapping

from kubernetes.aio import client

from csi_driver.core.errors import CertmountError, Fault, Reason
from csi_driver.core.secret import Secret
from csi_driver.core.stored_secrets import StoredSecrets
from csi_driver.kube.client import TIMEOUT_S, Conflict, ObjectName, answered


class SecretStore:
    """One Secret that the manifests have made: get and update on its one name are all that is needed."""

    def __init__(self, api: client.ApiClient, secret: ObjectName) -> None:
        self._api = client.CoreV1Api(api)
        self._secret = secret
        self.name = str(secret)

    async def load(self) -> StoredSecrets:
        """The values; raises CertmountError IssuerUnavailable, or InvalidCA where they are no base64."""
        secret = await self._read()
        try:
            values = {
                name: Secret(base64.b64decode(value or "", validate=True))
                for name, value in (secret.data or {}).items()
            }
        except binascii.Error:
            raise CertmountError(Reason.INVALID_CA, Fault(self.name, "holds a value that is not base64")) from None
        return StoredSecrets(values, _version(secret))

    async def save(self, values: Mapping[str, Secret[bytes]], based_on: StoredSecrets) -> bool:
        """Replaces the Secret's data and nothing else of it; False when another writer came first."""
        secret = await self._read()
        if _version(secret) != based_on.version:
            return False
        secret.data = {name: base64.b64encode(value.reveal()).decode("ascii") for name, value in values.items()}
        call = self._api.replace_namespaced_secret(
            self._secret.name, self._secret.namespace, secret, _request_timeout=TIMEOUT_S
        )
        try:
            await answered(call, Reason.ISSUER_UNAVAILABLE, self.name)
        except Conflict:
            return False
        return True

    async def _read(self) -> client.V1Secret:
        call = self._api.read_namespaced_secret(self._secret.name, self._secret.namespace, _request_timeout=TIMEOUT_S)
        return await answered(call, Reason.ISSUER_UNAVAILABLE, self.name)


def _version(secret: client.V1Secret) -> str:
    return (secret.metadata.resource_version if secret.metadata is not None else None) or ""
