"""Find the served version of the API, watch PodCertificateRequests and write their status once."""

from __future__ import annotations

import contextlib
import time

import structlog

from csi_driver._proto.pod_certificates_pb2 import PodCertificateRequest as Message
from csi_driver.core.cluster.pod_certificates import ISSUED, PodCertificateDecision, PodCertificateRequest
from csi_driver.core.errors import CertmountError, Reason
from csi_driver.core.texts import timestamp
from csi_driver.kube.client import Conflict, NotFound, call_api, invalid_response
from csi_driver.kube.connection import Api
from csi_driver.kube.json_requests import request_json, request_object
from csi_driver.kube.metadata import InvalidObject, Json
from csi_driver.kube.pod_certificates.request_cache import RequestCache
from csi_driver.kube.pod_certificates.requests import convert_request, read_request
from csi_driver.kube.reflector import Reflector, WatchedResource

log = structlog.get_logger(__name__)

GROUP = "/apis/certificates.k8s.io"
REQUESTS, BUNDLES = "podcertificaterequests", "clustertrustbundles"
_VERSIONS = ("v1", "v1beta1")  # the newest first; certmount does not use v1alpha1
_KIND = "PodCertificateRequest"
_MAX_ATTEMPTS = 3
_MAX_DISCOVERY_BYTES = 512 * 1024


async def served_version(api: Api, resource: str) -> str:
    """Return the newest version that the API server serves the resource in, or ""; raises CertmountError IssuerUnavailable."""
    for version in _VERSIONS:
        path = f"{GROUP}/{version}"
        call = request_json(api, "GET", path, max_bytes=_MAX_DISCOVERY_BYTES)
        try:
            found = await call_api(call, Reason.ISSUER_UNAVAILABLE, path)
        except NotFound:
            continue
        resources = found.get("resources")
        if isinstance(resources, list) and any(
            isinstance(one, dict) and one.get("name") == resource for one in resources
        ):
            return version
    return ""


class PodCertificateRequestClient:
    """Each method raises CertmountError IssuerUnavailable, ApiError for an error response.

    Call :meth:`find_version` first. An upgrade of the cluster can change the version, so a failed watch looks it up again.
    """

    def __init__(self, api: Api, watch_api: Api) -> None:
        """``watch_api`` has its own connections, because a watch holds one permanently."""
        self._api, self._watch_api = api, watch_api
        self._version = ""

    async def find_version(self) -> str:
        """Return the version of the API to use from now on, or "" if the API server does not serve it."""
        found = await served_version(self._api, REQUESTS)
        if found and self._version and found != self._version:
            log.info("pod certificate API version changed", api_version=found)
        self._version = found or self._version
        return found

    def watch(self, signer: str, sink: RequestCache) -> Reflector[PodCertificateRequest]:
        """Return a reflector that updates ``sink`` with the requests for a signer."""

        async def find_path() -> str:
            with contextlib.suppress(CertmountError):  # the reflector logs that the API server is unavailable
                await self.find_version()
            return self._requests_path()

        name, selector = f"{REQUESTS} for {signer}", f"spec.signerName={signer}"
        resource = WatchedResource(name, self._requests_path(), read_request, field_selector=selector)
        return Reflector(self._watch_api, resource, sink, find_path=find_path)

    def _requests_path(self) -> str:
        return f"{GROUP}/{self._version}/{REQUESTS}"

    async def finish(self, request: PodCertificateRequest, decision: PodCertificateDecision) -> bool:
        """Write the decision; return False if the request is already finished or deleted.

        The write names the resourceVersion and the UID of the request, so no decision is ever written twice.
        """
        version = self._version
        path = f"{GROUP}/{version}/namespaces/{request.namespace}/{REQUESTS}/{request.name}"
        current = request
        for attempt in range(1, _MAX_ATTEMPTS + 1):
            body = _status(version, current, decision)
            try:
                await self._call("PUT", f"{path}/status", request, body)
            except Conflict:
                if attempt == _MAX_ATTEMPTS:
                    raise
            except NotFound:
                if await self.find_version() != version:
                    raise  # the request can still exist; the caller retries
                return False
            else:
                return True
            found = await self._find(path, request)
            if found is None or found.uid != request.uid or found.finished:
                return False
            current = found
        raise AssertionError("the last attempt returns or raises")

    async def _find(self, path: str, request: PodCertificateRequest) -> PodCertificateRequest | None:
        try:
            return convert_request(await self._call("GET", path, request))
        except NotFound:
            return None
        except InvalidObject:
            raise invalid_response(Reason.ISSUER_UNAVAILABLE, _KIND) from None

    async def _call(self, method: str, path: str, request: PodCertificateRequest, body: Json | None = None) -> Message:
        call = request_object(self._api, method, path, Message, body=body)
        return await call_api(call, Reason.ISSUER_UNAVAILABLE, f"{_KIND} {request.key}")


def _status(version: str, request: PodCertificateRequest, decision: PodCertificateDecision) -> Json:
    """Return the request with its new status. The API server ignores the spec, which does not change."""
    condition = {
        "type": decision.kind,
        "status": "True",
        "reason": decision.reason,
        "message": decision.message,
        "lastTransitionTime": timestamp(int(time.time())),
    }
    status: Json = {"conditions": [condition]}
    if decision.kind == ISSUED:
        times = {
            "notBefore": decision.not_before,
            "beginRefreshAt": decision.begin_refresh_at,
            "notAfter": decision.not_after,
        }
        status |= {"certificateChain": decision.chain, **{name: timestamp(time_) for name, time_ in times.items()}}
    metadata = {
        "name": request.name,
        "namespace": request.namespace,
        "uid": request.uid,
        "resourceVersion": request.version,
    }
    return {"apiVersion": f"certificates.k8s.io/{version}", "kind": _KIND, "metadata": metadata, "status": status}
