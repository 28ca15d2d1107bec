"""Read issuer credentials from Kubernetes Secrets. Each Secret needs the permission ``get`` on its name only."""

from __future__ import annotations

import contextlib
from collections.abc import AsyncIterator

from csi_driver.authority.issuers.credentials import ReadSecret
from csi_driver.core.errors import CertmountError, Fault, Reason
from csi_driver.core.secret import Secret
from csi_driver.kube.client import ObjectName, connect, in_cluster_configuration
from csi_driver.kube.stored_objects import SecretStore


@contextlib.asynccontextmanager
async def cluster_secrets() -> AsyncIterator[ReadSecret]:
    """Open a connection for reading Secrets; raises CertmountError TokenReviewUnavailable outside a cluster."""
    async with connect(in_cluster_configuration()) as api:

        async def read_secret(namespace: str, name: str, key: str) -> Secret[bytes]:
            secret = ObjectName("Secret", namespace, name)
            values = (await SecretStore(api, secret).load()).values
            if key not in values:
                hint = f"it has {', '.join(sorted(values))}" if values else "it is empty"
                raise CertmountError(Reason.ISSUER_UNAVAILABLE, Fault(str(secret), f"has no key {key}", hint))
            return values[key]

        yield read_secret
