"""ClusterTrustBundles with certmount's root sets, written by server-side apply: a role can then name each bundle."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence

from csi_driver.core.cluster.pod_certificates import PublishedBundle
from csi_driver.core.errors import Reason
from csi_driver.kube.client import NotFound, call_api, invalid_response
from csi_driver.kube.connection import Api
from csi_driver.kube.json_requests import APPLY_PATCH, request_bytes, request_json
from csi_driver.kube.metadata import MANAGED, MANAGER, Json
from csi_driver.kube.pod_certificates.client import BUNDLES, GROUP, served_version

ROOT_SET_LABEL = "certmount.dev/root-set"
_GENERATION = "certmount.dev/generation"
_MAX_BUNDLE_BYTES = 4 * 2**20
_MAX_LIST_BYTES = 16 * 2**20
"""Of all bundles of certmount, which only the authority can write."""


def bundle_name(signer: str, root_set: str) -> str:
    """Return the name of an object: the API requires the signer's name with colons as its prefix."""
    return f"{signer.replace('/', ':')}:{root_set}"


class TrustBundleClient:
    """The bundles of one signer. Each method raises CertmountError IssuerUnavailable, ApiError for an error response."""

    def __init__(self, api: Api, signer: str) -> None:
        self._api, self._signer = api, signer

    async def version(self) -> str:
        """Return the version of the API to use, or "" if the API server does not serve it."""
        return await served_version(self._api, BUNDLES)

    async def list(self, version: str) -> Sequence[PublishedBundle]:
        """Return the bundles that certmount wrote."""
        selector = "&".join((f"labelSelector={','.join(f'{key}%3D{value}' for key, value in MANAGED.items())}",
                             f"fieldSelector=spec.signerName%3D{self._signer.replace('/', '%2F')}"))  # fmt: skip
        path = f"{GROUP}/{version}/{BUNDLES}?{selector}"
        call = request_json(self._api, "GET", path, max_bytes=_MAX_LIST_BYTES)
        items = (await call_api(call, Reason.ISSUER_UNAVAILABLE, BUNDLES)).get("items")
        return [self._read(item) for item in items or ()]

    async def find(self, version: str, root_set: str) -> PublishedBundle | None:
        name = bundle_name(self._signer, root_set)
        call = request_json(self._api, "GET", f"{GROUP}/{version}/{BUNDLES}/{name}", max_bytes=_MAX_BUNDLE_BYTES)
        try:
            return self._read(await call_api(call, Reason.ISSUER_UNAVAILABLE, f"ClusterTrustBundle {name}"))
        except NotFound:
            return None

    async def write(self, version: str, bundle: PublishedBundle) -> None:
        """Create or replace the bundle; raises Conflict if it no longer has the version of ``bundle``."""
        name = bundle_name(self._signer, bundle.name)
        metadata: Json = {
            "name": name,
            "labels": {**MANAGED, ROOT_SET_LABEL: bundle.name},
            "annotations": {_GENERATION: str(bundle.generation)},
        }
        if bundle.version:
            metadata["resourceVersion"] = bundle.version
        body = {
            "apiVersion": f"certificates.k8s.io/{version}",
            "kind": "ClusterTrustBundle",
            "metadata": metadata,
            "spec": {"signerName": self._signer, "trustBundle": bundle.roots},
        }
        path = f"{GROUP}/{version}/{BUNDLES}/{name}?fieldManager={MANAGER}&force=true"
        await self._send("PATCH", path, name, body, {"Content-Type": APPLY_PATCH})

    async def delete(self, version: str, root_set: str) -> None:
        """Delete the bundle, if it exists."""
        name = bundle_name(self._signer, root_set)
        with contextlib.suppress(NotFound):
            await self._send("DELETE", f"{GROUP}/{version}/{BUNDLES}/{name}", name)

    async def _send(
        self, method: str, path: str, name: str, body: Json | None = None, headers: dict[str, str] | None = None
    ) -> None:
        call = request_bytes(self._api, method, path, body=body, headers=headers, max_bytes=_MAX_BUNDLE_BYTES)
        await call_api(call, Reason.ISSUER_UNAVAILABLE, f"ClusterTrustBundle {name}")

    def _read(self, item: Json) -> PublishedBundle:
        try:
            metadata = item["metadata"]
            generation = (metadata.get("annotations") or {}).get(_GENERATION, "0")
            prefix = bundle_name(self._signer, "")
            return PublishedBundle(
                name=str(metadata["name"]).removeprefix(prefix),
                generation=int(generation) if str(generation).isdigit() else 0,
                roots=str(item["spec"]["trustBundle"]),
                version=str(metadata["resourceVersion"]),
            )
        except (KeyError, TypeError, AttributeError, ValueError):
            raise invalid_response(Reason.ISSUER_UNAVAILABLE, BUNDLES) from None
